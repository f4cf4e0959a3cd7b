"""Log lines are events with fields: `gang.repaired cell=1.0 seconds=3.2`.

An event is named for what happened, its fields hold figures and names that an operator can
search for. What clients send stays out: never a prompt, never generated text, never a key; a
tenant's name and a request's id are fine.
"""

import json
import logging
import re
import sys
import time

ROOT = "expertline"
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")


class EventLogger:
    """Writes one part's events; of a disabled level, nothing is formatted."""

    def __init__(self, part: str) -> None:
        self._logger = logging.getLogger(f"{ROOT}.{part}")

    def event(self, level: str, event: str, /, **fields: object) -> None:
        """Logs that `event` happened, at `level` ("DEBUG" … "ERROR"), with its fields in order.

        Raises:
            KeyError: there is no such level.
        """
        number = logging.getLevelNamesMapping()[level]
        if self._logger.isEnabledFor(number):
            words = [event, *(f"{name}={_written(value)}" for name, value in fields.items())]
            self._logger.log(number, "%s", " ".join(words))


def get_logger(part: str) -> EventLogger:
    """The logger of one part of the system, such as "router" or "gang"."""
    return EventLogger(part)


def setup_logging(level: str) -> None:
    """Sends this process's events of at least `level` to stderr, one a line, times in UTC.

    Other libraries' logging is left as it is. May be called again to change the level.

    Raises:
        ValueError: there is no such level.
    """
    root = logging.getLogger(ROOT)
    root.setLevel(level)
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s")
    formatter.converter = time.gmtime
    formatter.default_time_format = "%Y-%m-%dT%H:%M:%S"
    formatter.datefmt = formatter.default_time_format
    handler = logging.StreamHandler(sys.__stderr__)  # Serve's replicas swallow `sys.stderr`
    handler.setFormatter(formatter)
    root.handlers[:] = [handler]
    root.propagate = False  # Ray and Serve have handlers on the root, which would write it twice


def _written(value: object) -> str:
    """A field's value: bare if it is one plain word, else quoted and escaped as in JSON."""
    text = str(round(value, 3)) if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
