"""`python -m loadtest.chaos.hoarder URL`: connections without end, each with half a request.

Prints how many it holds once it has no descriptor left, and keeps them until it is killed.
"""

import errno
import resource
import signal
import socket
import sys
from urllib.parse import urlsplit

DESCRIPTORS = 128
_HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"


def main() -> None:
    """Runs until it is killed."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    address = urlsplit(sys.argv[1])
    assert address.hostname is not None
    held = []
    while True:
        try:
            connection = socket.create_connection((address.hostname, address.port or 80), 10.0)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            break
        connection.sendall(_HALF)
        held.append(connection)
    print(len(held), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
