"""Who gets an operation: the fastest that computes the same, at every size."""

import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model.ops import choice, contest
from model.ops.contest import Contest, Size, hold, measured, unfit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    choice.choose("cpu", "auto")


class Entrants:
    """Kinds whose times and results are made up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: list[float]) -> None:
        self.times = {"cpu": [1.0, 1.0], **times}
        self.results = dict.fromkeys(self.times, 1.0)
        self._now: tuple[str, int] = ("", 0)
        monkeypatch.setattr(choice, "offered", self._offered)
        monkeypatch.setattr(contest, "offered", self._offered)
        monkeypatch.setattr(choice, "modules_of", lambda kind: ())
        monkeypatch.setattr(choice, "installed", lambda kind: True)
        monkeypatch.setattr(contest, "installed", lambda kind: kind != "absent")

    def _offered(self, kind: str, operation: str) -> Callable[[int], Tensor]:
        def compute(size: int) -> Tensor:
            if self.results[kind] is None:
                raise OSError("a library of somebody else's")
            self._now = (kind, size)
            return torch.tensor([self.results[kind], 1.0])

        return compute

    def seconds(self, call: Callable[[], Tensor]) -> float:
        call()
        kind, size = self._now
        return self.times[kind][size]

    def hold(self, *challengers: str) -> str:
        def size(number: int) -> Size:
            def call(implementations: Sequence[Callable[..., Tensor]]) -> Callable[[], Tensor]:
                return lambda: implementations[0](number)

            return Size(str(number), call)

        return hold(Contest(("attend",), challengers, (size(0), size(1))), CPU, self.seconds)


def test_the_fastest_gets_the_operation_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entrants = Entrants(monkeypatch, library=[0.8, 0.9], flashinfer=[0.5, 0.6])
    with caplog.at_level(logging.INFO, logger="expertline.ops"):
        assert entrants.hold("library", "flashinfer") == "flashinfer"
    assert choice.chosen_for("attend", "cpu")[0] == "flashinfer"
    assert choice.chosen_for("linear", "cpu")[0] == "cpu"
    (record,) = caplog.records
    assert record.getMessage() == (
        "ops.contest operation=attend sizes=0,1 unit=us cpu=1000000,1000000 "
        "library=800000,900000 flashinfer=500000,600000 chosen=flashinfer"
    )


@pytest.mark.parametrize("times", [[0.5, 1.2], [0.99, 0.99], [2.0, 2.0]])
def test_who_is_not_faster_at_every_size_gets_nothing(
    times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Entrants(monkeypatch, library=times).hold("library") == "cpu"
    assert choice._forced == {}


@pytest.mark.parametrize("result", [1.1, float("nan"), None])
def test_who_computes_something_else_or_fails_has_lost(
    result: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entrants = Entrants(monkeypatch, library=[0.1, 0.1])
    entrants.results["library"] = result  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, logger="expertline.ops"):
        assert entrants.hold("library") == "cpu"
    why = "failed:OSError" if result is None else "wrong_results"
    assert f"library={why} chosen=cpu" in caplog.records[0].getMessage()


def test_who_is_not_there_does_not_compete(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="expertline.ops"):
        assert Entrants(monkeypatch, absent=[0.1, 0.1]).hold("absent") == "cpu"
    assert "absent=not_installed chosen=cpu" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("kind", "major", "fits"),
    [("flash_mla", 9, True), ("flash_mla", 10, False), ("flash_mla", 8, False),
     ("flashinfer", 8, True), ("flashinfer", 7, False), ("library", 10, True)],
)  # fmt: skip
def test_kinds_know_their_devices(
    kind: str, major: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "installed", lambda kind: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    reason = unfit(kind, torch.device("cuda"))
    assert reason == (None if fits else "not_for_this_device")


def test_a_call_is_timed() -> None:
    calls = []
    assert measured(lambda: calls.append(1) or torch.zeros(1), CPU) >= 0  # type: ignore[func-returns-value]
    assert len(calls) > 3
