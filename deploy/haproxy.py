"""HAProxy as Serve starts it, with what Serve's template has no setting for.

Serve writes a configuration file and runs the binary that RAY_SERVE_HAPROXY_BINARY_PATH names on
it, at the start and at every reload. We name a launcher that ends in this module instead: it
adapts the file where it lies and becomes HAProxy.

    python haproxy.py BINARY ARGUMENT…      (standard library only: it runs at every reload)
"""

import os
import re
import shlex
import sys
from pathlib import Path

REPLAYED_BYTES = 128 * 1024  # the largest request, headers and body, that is sent a second time
RETRIES = 3
REQUEST_TIMEOUT_S = 60  # for a request's head, and for as much of its body as is replayed
_DEFAULTS = re.compile(r"^defaults$", re.MULTILINE)
_FRONTEND = re.compile(r"^frontend http_frontend$", re.MULTILINE)
_NOBODY = re.compile(r'return status 404 (content-type text/plain lf-string "Path )')
_SPLICE = re.compile(r"^\s+option splice-\w+\n", re.MULTILINE)
_MARK = "# adapted by expertline"


class TemplateChanged(Exception):
    """Serve's configuration does not look as this module knows it."""


def settings_of_serve(longest_stream_s: float) -> dict[str, str]:
    """What Serve's template has a variable for (`RAY_SERVE_HAPROXY_…`).

    A request that an ingress died on before it answered a byte is sent to another one: nothing
    but the client's answer depends on it. Once a byte has been answered HAProxy never repeats.
    A worker that a reload has replaced may live as long as the longest stream.
    """
    seconds = str(round(longest_stream_s))
    return {
        "RETRY_ON": "conn-failure empty-response",
        "RETRIES": str(RETRIES),
        "TUNE_BUFSIZE": str(REPLAYED_BYTES),
        "HARD_STOP_AFTER_S": seconds,
        "TIMEOUT_CLIENT_S": seconds,
        "NBTHREAD": "1",
    }


def adapted(configuration: str) -> str:
    """Serve's configuration with our additions; one that has them already is left as it is.

    - No splicing: what the kernel moves from socket to socket HAProxy does not look at, and a
      client that leaves meanwhile is noticed late.
    - The body is read before a server is chosen, so that it can be sent again; a client that is
      slow with it is let go in time.
    - A client's header must not switch off the watch for its leaving.
    - While the application is not there, or no longer, a request is told to come back: a 404
      would be the last word.

    Raises:
        TemplateChanged: a place that an addition belongs to is not there.
    """
    if _MARK in configuration:
        return configuration
    for place in (_DEFAULTS, _FRONTEND, _NOBODY):
        if len(place.findall(configuration)) != 1:
            raise TemplateChanged(f"no single place that matches {place.pattern}")
    text = _SPLICE.sub("", configuration)
    text = _NOBODY.sub(r"return status 503 hdr retry-after 1 \1", text)
    body = f"option http-buffer-request\n    timeout http-request {REQUEST_TIMEOUT_S}s"
    text = _DEFAULTS.sub(f"defaults\n    {_MARK}\n    {body}", text)
    header = "http-request del-header x-request-disconnect-disabled"
    return _FRONTEND.sub(f"frontend http_frontend\n    {header}", text)


def write_launcher(path: Path, binary: str) -> None:
    """An executable that Serve can take for HAProxy's binary."""
    command = shlex.join([sys.executable, "-I", "-S", os.path.abspath(__file__), binary])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


def main(binary: str, *arguments: str) -> None:
    """Adapts the file behind `-f`, if there is one, and becomes HAProxy."""
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(adapted(file.read_text(encoding="utf-8")), encoding="utf-8")
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
