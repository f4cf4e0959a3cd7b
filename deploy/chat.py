"""`expertline chat`: a conversation in the terminal, streamed."""

import json
import os
import readline
import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

from deploy.chat_server import Server, ServerError, Turn
from deploy.errors import UsageError

_CONNECT_S = 5.0
_HISTORY_LINES = 1000
_END_OF_TEXT = "."
_CLEAR = "-"
# What a model writes is not to move the cursor or to change colours: only line feed and tab stay.
_NO_CONTROLS = {code: "�" for code in (*range(32), 127, *range(128, 160)) if code not in (9, 10)}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Where to talk, and how."""

    url: str
    model: str | None
    system: str | None
    temperature: float | None
    max_tokens: int | None
    api_key: str | None


def talk(options: ChatOptions, console: Console) -> None:
    """Reads lines until end of input. Ctrl-C stops an answer or clears a line, nothing more.

    Raises:
        UsageError: no server there, or it refuses us.
    """
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    with httpx.Client(base_url=options.url, headers=headers, timeout=timeout) as client:
        server = Server(client, options.temperature, options.max_tokens)
        try:
            models = server.models()
        except ServerError as error:
            raise UsageError(f"{options.url}: {error}") from error
        model = options.model or models[0]
        if model not in models:
            raise UsageError(f"{options.url}: no model {model} there, but {', '.join(models)}")
        conversation = Talk(server, console, model, options.system or "")
        conversation.note(f"{model} at {options.url}; /help lists commands, Ctrl-D ends")
        conversation.run()


class History:
    """Lines of this and earlier sessions, for the arrow keys; the file is for its owner alone."""

    def __init__(self) -> None:
        readline.set_auto_history(False)  # the lines of /fim are no lines to repeat
        readline.parse_and_bind("tab: self-insert")  # code has tabs, and there are no completions
        readline.set_history_length(_HISTORY_LINES)
        # A history that cannot be read or kept is no reason not to talk.
        with suppress(OSError):
            readline.read_history_file(_history_path())

    def add(self, line: str) -> None:
        """Remembers a line, at once and for the sessions to come."""
        readline.add_history(line)
        path = _history_path()
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            readline.append_history_file(1, path)


def _history_path() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # the specification: ignored then
        state = Path.home() / ".local" / "state"
    return state / "expertline" / "chat_history"


@dataclass(slots=True)
class Talk:
    """A conversation, and the commands that shape it.

    `turns` alternate: each of the user's has its answer right behind it.
    """

    server: Server
    console: Console
    model: str
    system: str
    turns: list[Turn] = field(default_factory=list)
    over: bool = False

    def run(self) -> None:
        """Reads and answers until the end of input or `/quit`."""
        history = History() if sys.stdin.isatty() else None
        while not self.over:
            try:
                line = input("> ")
                if not line.strip():
                    continue
                if history is not None:
                    history.add(line)
                self._obey(line) if line.startswith("/") else self._say(line)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
            except ServerError as error:
                self._complain(str(error))

    def _say(self, text: str) -> None:
        """One turn; it is not part of the conversation unless something was answered."""
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        said, stopped = self._show(self.server.chat(self.model, [*system, *self.turns, asked]))
        if said or not stopped:
            self.turns += [asked, {"role": "assistant", "content": said}]

    def _show(self, pieces: Generator[str]) -> tuple[str, bool]:
        """Prints an answer as it comes: what it said, and whether Ctrl-C ended it."""
        said = ""
        stopped = False
        try:
            # Ctrl-C may come while a piece is printed: the connection is to be closed then too.
            with closing(pieces):
                for piece in pieces:
                    said += piece
                    self.console.out(piece.translate(_NO_CONTROLS), end="", highlight=False)
        except KeyboardInterrupt:
            stopped = True
            self.console.out(" [stopped]", end="", style="dim", highlight=False)
        finally:
            if stopped or (said and not said.endswith("\n")):
                self.console.print()
        return said, stopped

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = _COMMANDS.get(name)
        if command is None:
            self._complain(f"no command {name}; /help lists them, a space before it sends the line")
            return
        command(self, rest.strip())

    def _set_system(self, text: str) -> None:
        """TEXT: set the system message; alone: show it; `-`: clear it"""
        if text:
            self.system = "" if text == _CLEAR else text
        self.note(self.system or "no system message")

    def _fill_in(self, _: str) -> None:
        """fill in the middle: asks for what stands before and after"""
        self.note(f"before the gap, to the very character; end with a line of one `{_END_OF_TEXT}`")
        prefix = _read_text()
        self.note(f"after the gap; end with a line of one `{_END_OF_TEXT}`")
        suffix = _read_text()
        self._show(self.server.middle(self.model, prefix, suffix))

    def _reset(self, _: str) -> None:
        """forget the conversation; the system message stays"""
        self.turns.clear()
        self.note("the conversation is empty")

    def _undo(self, _: str) -> None:
        """take back the last turn and its answer"""
        undone = self.turns[-2:]
        del self.turns[-2:]
        self.note(f"taken back: {undone[0]['content']}" if undone else "nothing to take back")

    def _save(self, name: str) -> None:
        """FILE: write the conversation as JSON into a new file"""
        if not name:
            self._complain("/save FILE")
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.model, "messages": [*system, *self.turns]}
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                json.dump(body, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except (OSError, RuntimeError) as error:  # RuntimeError: a ~name that is nobody's
            self._complain(f"{name}: {getattr(error, 'strerror', None) or error}")
            return
        self.note(f"{len(self.turns)} messages in {name}")

    def _use_model(self, name: str) -> None:
        """NAME: talk to this one from now on; alone: show which there are"""
        models = self.server.models()
        if name and name not in models:
            self._complain(f"no model {name} there, but {', '.join(models)}")
            return
        self.model = name or self.model
        others = [model for model in models if model != self.model]
        self.note(self.model + (f"; also there: {', '.join(others)}" if others else ""))

    def _help(self, _: str) -> None:
        """this list"""
        for name, command in _COMMANDS.items():
            self.note(f"{name:8} {command.__doc__}")
        self.note("Ctrl-C stops an answer or clears the line, Ctrl-D ends")

    def _quit(self, _: str) -> None:
        """end"""
        self.over = True

    def note(self, text: str) -> None:
        """A line of ours among the conversation's."""
        self.console.out(text.translate(_NO_CONTROLS), style="dim", highlight=False)

    def _complain(self, text: str) -> None:
        line = " ".join(text.split()).translate(_NO_CONTROLS)
        self.console.out(f"error: {line}", style="red", highlight=False)


_COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/system": Talk._set_system,
    "/fim": Talk._fill_in,
    "/reset": Talk._reset,
    "/undo": Talk._undo,
    "/save": Talk._save,
    "/model": Talk._use_model,
    "/help": Talk._help,
    "/quit": Talk._quit,
}


def _read_text() -> str:
    """Lines up to one of a single dot; the text ends where the last of them ends."""
    lines = []
    while (line := input("| ")) != _END_OF_TEXT:
        lines.append(line)
    return "\n".join(lines)
