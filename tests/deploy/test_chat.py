"""`expertline chat` in a terminal of its own, against a server that says what a test scripts."""

import fcntl
import json
import os
import platform
import pty
import re
import select
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.scripted_api import Scripted, ScriptedApi, scripted_api

WAIT_S = 60.0
CTRL_C = "\x03"
CTRL_D = "\x04"
UP = "\x1b[A"
_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])|\r")
# Numbers of the system calls poll, select, recvfrom, pselect6 and ppoll.
_WAITS = {"x86_64": {"7", "23", "45", "270", "271"}, "aarch64": {"72", "73", "207"}}
# A child takes the terminal as its own, so that Ctrl-C is a signal to it and to nobody else; and
# listens to it, even if these tests run in the background of a shell, which ignores it.
_PROGRAM = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from deploy.cli import main
main()
"""


class Terminal:
    """What a person at the terminal does: type, and read what appears."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self._master = master
        self._raw = b""
        self._read_to = 0

    @property
    def screen(self) -> str:
        """Everything printed so far, without colours and cursor movements."""
        return _SEQUENCE.sub("", self._raw.decode(errors="replace"))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str) -> str:
        """Waits until the text appears after what was expected before; returns what led to it."""
        deadline = time.monotonic() + WAIT_S
        while (found := self.screen.find(text, self._read_to)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen!r}"
            assert self._read(), f"ended without {text!r}: {self.screen!r}"
        passed = self.screen[self._read_to : found]
        self._read_to = found + len(text)
        return passed

    def say(self, line: str) -> None:
        """A line at the prompt."""
        self.expect("> ")
        self.type(f"{line}\n")
        self.expect(f"{line}\n")

    def interrupt(self) -> None:
        """Ctrl-C, as late as a person's: once the program waits for the network or the keyboard.

        Python notices a signal that comes just before it begins to wait only afterwards. That it
        sleeps is not enough to know: it may do so on its way there, while it prints.
        """
        inside = Path(f"/proc/{self.process.pid}/syscall")
        deadline = time.monotonic() + WAIT_S
        while inside.read_text().split()[0] not in _WAITS[platform.machine()]:
            assert time.monotonic() < deadline, "the program does not come to wait"
        self.type(CTRL_C)

    def end(self) -> int:
        """Ctrl-D at the prompt, and the exit code."""
        self.expect("> ")
        self.type(CTRL_D)
        return self.wait()

    def wait(self) -> int:
        while self._read():
            pass
        return self.process.wait(timeout=WAIT_S)

    def _read(self) -> bool:
        """Whether the program may still print: takes what it has, waiting a little for it."""
        if not select.select([self._master], [], [], 1.0)[0]:
            return True
        try:
            part = os.read(self._master, 65536)
        except OSError:  # Linux says so when the other end is closed
            return False
        self._raw += part
        return bool(part)


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    with scripted_api() as api:
        yield api


@contextmanager
def chat(api: ScriptedApi, home: Path, *arguments: str, **variables: str) -> Iterator[Terminal]:
    kept = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    kept.pop("XDG_STATE_HOME", None)
    environment = {**kept, "HOME": str(home), "TERM": "xterm", **variables}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 300, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, "chat", "--url", api.url, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=environment,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_a_conversation_streams_and_repeats_itself_to_the_server(
    api: ScriptedApi, tmp_path: Path
) -> None:
    api.answers.extend([Scripted((":x: [red]", " a\u2028b", "\n")), Scripted(("Yes",))])
    with chat(api, tmp_path, "--temperature", "0", "--system", "Be brief.") as terminal:
        terminal.expect("scripted at")
        terminal.say("Hello")
        terminal.expect(":x: [red] a\u2028b\n")
        terminal.say("Really?")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    assert api.seen[0].body == {
        "model": "scripted",
        "messages": [{"role": "system", "content": "Be brief."}, user("Hello")],
        "stream": True,
        "temperature": 0,
        "max_tokens": 512,
    }
    expected = [user("Hello"), assistant(":x: [red] a\u2028b\n"), user("Really?")]
    assert api.seen[1].body["messages"][1:] == expected


def test_ctrl_c_stops_an_answer_at_the_server_and_keeps_what_was_said(
    api: ScriptedApi, tmp_path: Path
) -> None:
    api.answers.extend([Scripted(("One,", " two,"), ending="hang"), Scripted(("three",))])
    with chat(api, tmp_path) as terminal:
        terminal.say("Count.")
        terminal.expect("One, two,")
        terminal.interrupt()
        terminal.expect("[stopped]\n")
        assert api.gone.wait(WAIT_S)
        terminal.say("Go on.")
        terminal.expect("three\n")
        assert terminal.end() == 0
    messages = [user("Count."), assistant("One, two,"), user("Go on.")]
    assert api.seen[1].body["messages"] == messages


def test_a_turn_stopped_before_its_first_word_leaves_no_trace(
    api: ScriptedApi, tmp_path: Path
) -> None:
    api.answers.extend([Scripted(ending="hang"), Scripted(("Yes",))])
    with chat(api, tmp_path) as terminal:
        terminal.say("Count.")
        assert api.asked.acquire(timeout=WAIT_S)
        terminal.interrupt()
        terminal.expect("[stopped]\n")
        assert api.gone.wait(WAIT_S)
        terminal.say("Hello")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    assert api.seen[1].body["messages"] == [user("Hello")]


def test_ctrl_c_at_the_prompt_clears_the_line(api: ScriptedApi, tmp_path: Path) -> None:
    api.answers.append(Scripted(("Yes",)))
    with chat(api, tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type("never sent")
        terminal.expect("never sent")
        terminal.interrupt()
        terminal.say("Hello")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    assert [seen.body["messages"] for seen in api.seen] == [[user("Hello")]]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Scripted(("half",), ending="error", error="The engine\nis gone."), "The engine is gone."),
        (Scripted(("half",), ending="cut"), "the connection was lost"),
        (Scripted(refused="Too long."), "Too long."),
    ],
    ids=["error event", "connection lost", "refused"],
)
def test_a_failed_turn_is_one_line_and_taken_out(
    api: ScriptedApi, tmp_path: Path, answer: Scripted, line: str
) -> None:
    api.answers.extend([answer, Scripted(("Yes",))])
    with chat(api, tmp_path) as terminal:
        terminal.say("Hello")
        terminal.expect(f"error: {line}")
        terminal.say("Again")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.screen
    assert api.seen[1].body["messages"] == [user("Again")]


def test_the_middle_is_filled_in_and_is_no_turn(api: ScriptedApi, tmp_path: Path) -> None:
    api.answers.extend([Scripted(("return", " 1")), Scripted(("Yes",))])
    with chat(api, tmp_path) as terminal:
        terminal.say("/fim")
        for line in ("def f():", "\tif True:", "    ", "."):
            terminal.expect("| ")
            terminal.type(f"{line}\n")
        terminal.expect("after the gap")
        for line in ("", "f()", "."):
            terminal.expect("| ")
            terminal.type(f"{line}\n")
        terminal.expect("return 1\n")
        terminal.say("Hello")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    assert api.seen[0].path == "/v1/completions"
    assert api.seen[0].body == {
        "model": "scripted",
        "prompt": "def f():\n\tif True:\n    ",
        "suffix": "\nf()",
        "stream": True,
        "max_tokens": 512,
    }
    assert api.seen[1].body["messages"] == [user("Hello")]


def test_the_gap_is_given_up_with_ctrl_c(api: ScriptedApi, tmp_path: Path) -> None:
    with chat(api, tmp_path) as terminal:
        terminal.say("/fim")
        terminal.expect("| ")
        terminal.interrupt()
        assert terminal.end() == 0
    assert api.seen == []


def test_commands_shape_the_conversation(api: ScriptedApi, tmp_path: Path) -> None:
    api.answers.extend(Scripted((f"answer {n}",)) for n in range(4))
    with chat(api, tmp_path) as terminal:
        terminal.say("/system Be brief.")
        for n in range(2):
            terminal.say(f"question {n}")
            terminal.expect(f"answer {n}\n")
        terminal.say("/undo")
        terminal.expect("taken back: question 1")
        terminal.say("/system")
        terminal.expect("Be brief.\n")
        terminal.say("/model other")
        terminal.say("question 2")
        terminal.expect("answer 2\n")
        terminal.say("/reset")
        terminal.say("/system -")
        terminal.expect("no system message\n")
        terminal.say("/undo")
        terminal.expect("nothing to take back\n")
        terminal.say("question 3")
        terminal.expect("answer 3\n")
        terminal.say("/quit")
        assert terminal.wait() == 0
    system = {"role": "system", "content": "Be brief."}
    first = [system, user("question 0"), assistant("answer 0")]
    assert api.seen[2].body["messages"] == [*first, user("question 2")]
    assert api.seen[2].body["model"] == "other"
    assert api.seen[3].body["messages"] == [user("question 3")]


def test_what_a_command_cannot_do_is_one_line(api: ScriptedApi, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with chat(api, tmp_path) as terminal:
        for command, line in (
            ("/fly", "no command /fly"),
            ("/save", "/save FILE"),
            (f"/save {taken}", "File exists"),
            (f"/save {tmp_path}/none/file", "No such file"),
            ("/model third", "no model third there, but scripted, other"),
        ):
            terminal.say(command)
            terminal.expect("error: ")
            assert terminal.expect("\n").count(line) == 1
        terminal.say("/help")
        terminal.expect("/system")
        terminal.expect("Ctrl-D")
        assert terminal.end() == 0
    assert taken.read_text() == "mine"


def test_a_conversation_is_saved_as_a_request(api: ScriptedApi, tmp_path: Path) -> None:
    api.answers.append(Scripted(("Yes, é",)))
    with chat(api, tmp_path, "--system", "Be brief.") as terminal:
        terminal.say("Hello")
        terminal.expect("Yes, é\n")
        terminal.say("/save ~/talk.json")
        terminal.expect("2 messages")
        assert terminal.end() == 0
    assert json.loads((tmp_path / "talk.json").read_text()) == {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Hello"),
            assistant("Yes, é"),
        ],
    }


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_next_session_knows_the_lines_of_the_last(
    api: ScriptedApi, tmp_path: Path, elsewhere: bool
) -> None:
    api.answers.extend([Scripted(("Yes",)), Scripted(("No",))])
    variables = {"XDG_STATE_HOME": str(tmp_path / "state")} if elsewhere else {}
    with chat(api, tmp_path, **variables) as terminal:
        terminal.say("Hello")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    state = tmp_path / ("state" if elsewhere else ".local/state")
    file = state / "expertline" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == "Hello\n"
    with chat(api, tmp_path, **variables) as terminal:
        terminal.expect("> ")
        terminal.type(f"{UP}\n")
        terminal.expect("Hello")
        terminal.expect("No\n")
        assert terminal.end() == 0
    assert [seen.body["messages"] for seen in api.seen] == [[user("Hello")]] * 2


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    api: ScriptedApi, tmp_path: Path
) -> None:
    api.answers.append(Scripted(("a\x1b]0;title\x07b\rc\n",)))
    with chat(api, tmp_path) as terminal:
        terminal.say("Hello")
        terminal.expect("a�]0;title�b�c\n")
        assert terminal.end() == 0


def test_the_key_is_sent_and_a_refused_one_ends_the_program(
    api: ScriptedApi, tmp_path: Path
) -> None:
    api.key = "sk-right"
    api.answers.append(Scripted(("Yes",)))
    with chat(api, tmp_path, OPENAI_API_KEY="sk-right") as terminal:
        terminal.say("Hello")
        terminal.expect("Yes\n")
        assert terminal.end() == 0
    with chat(api, tmp_path, OPENAI_API_KEY="sk-wrong") as terminal:
        assert terminal.wait() == 2
        assert terminal.screen == f"expertline: {api.url}: This key is unknown.\n"


def test_a_server_that_is_not_there_ends_the_program(tmp_path: Path) -> None:
    with chat(ScriptedApi(url="http://127.0.0.1:9"), tmp_path) as terminal:
        assert terminal.wait() == 2
        assert terminal.screen.startswith("expertline: http://127.0.0.1:9: no server answers")
