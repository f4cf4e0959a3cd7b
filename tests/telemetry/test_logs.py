"""Log lines are events with fields."""

import logging
import re

import pytest

from serving.telemetry.logs import ROOT, get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger(ROOT)
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def test_a_line_has_time_level_part_event_and_fields(capfd):
    setup_logging("INFO")
    get_logger("gang").event("INFO", "gang.repaired", cell="1.0", seconds=3.21049, sequences=14)
    line = capfd.readouterr().err
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO expertline\.gang "
        r"gang\.repaired cell=1\.0 seconds=3\.21 sequences=14\n",
        line,
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("line\nbreak", '"line\\nbreak"'),
        ("\x1b[31m", '"\\u001b[31m"'),
        ("müller", "müller"),
        (None, "None"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_values_that_are_no_plain_word_are_quoted(capfd, value, written):
    setup_logging("DEBUG")
    get_logger("x").event("WARNING", "odd", value=value)
    assert capfd.readouterr().err.endswith(f" odd value={written}\n")


def test_a_lower_level_is_not_written_and_a_second_setup_does_not_double_lines(capfd):
    setup_logging("DEBUG")
    setup_logging("WARNING")
    log = get_logger("x")
    log.event("INFO", "quiet", level="kept apart", event="too")
    log.event("ERROR", "loud", level="a", event="b")
    assert capfd.readouterr().err.count("\n") == 1


def test_an_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="LOUD"):
        setup_logging("LOUD")
