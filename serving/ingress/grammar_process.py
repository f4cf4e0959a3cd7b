"""A process that compiles grammars, so that one which takes for ever can be killed.

Most grammars compile in a millisecond, and some (a few kilobytes of regular expression will do)
in minutes or in gigabytes; nothing that the library counts tells them apart beforehand. So each
is tried in a process of its own kind, with a limit of memory and of computing time: on the clock
a good one would be too slow when the machine stands still.
"""

import contextlib
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.grammar import GrammarCompiler, GrammarError

_COMPILE_CPU_S = 2  # normally 1 ms
_COMPILE_TIMEOUT_S = 20.0  # for the same, on a machine that gives a tenth of its time
_START_TIMEOUT_S = 60.0
_MEMORY_BYTES = 2 << 30
_LENGTH_BYTES = 4
_GOOD = "ok"


class GrammarTooCostly(GrammarError):
    """A grammar that was given up; there is no sense in trying a variant of it."""


class GrammarProcess:
    """The parent's side; one caller at a time.

    Args:
        directory: the checkpoint, for its tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, source: str) -> None:
        """Returns if the grammar can be compiled within the limits.

        Raises:
            GrammarError: it cannot.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        text = source.encode()
        try:
            process.stdin.write(len(text).to_bytes(_LENGTH_BYTES, "big") + text)
            process.stdin.flush()
            said = self._line(process, _COMPILE_TIMEOUT_S)
        except OSError:
            said = ""
        if not said:
            self.close()
            slow = said is None or process.returncode == -signal.SIGXCPU
            what = "long" if slow else "much memory"
            raise GrammarTooCostly(f"it takes too {what} to compile")
        if said != _GOOD:
            raise GrammarError(said)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "serving.ingress.grammar_process", str(self._directory)]
        process = self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._line(process, _START_TIMEOUT_S) != _GOOD:
            self.close()
            raise GrammarTooCostly("the process that compiles grammars did not start")
        return process

    def _line(self, process: "subprocess.Popen[bytes]", timeout_s: float) -> str | None:
        """The child's next line; empty if it has ended, None if it is silent for so long."""
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], timeout_s)
        return process.stdout.readline().decode().rstrip("\n") if readable else None


def main(directory: Path) -> None:
    """The child: grammars from standard input, one line of verdict for each."""
    tokenizer = Tokenizer.from_directory(directory, ModelConfig.from_directory(directory))
    compiler = GrammarCompiler(tokenizer)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(BrokenPipeError):  # the parent has gone
        _say(_GOOD)
        while length := sys.stdin.buffer.read(_LENGTH_BYTES):
            source = sys.stdin.buffer.read(int.from_bytes(length, "big"))
            _allow_cpu(_COMPILE_CPU_S)
            try:
                compiler.compile(source.decode())
            except GrammarError as error:
                _say(str(error))
            else:
                _say(_GOOD)


def _allow_cpu(seconds: int) -> None:
    """From now on so much, and up to a second more; then SIGXCPU ends this process."""
    spent = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))


def _say(line: str) -> None:
    os.write(sys.stdout.fileno(), line.encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
