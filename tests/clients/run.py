"""Other people's clients against this server: `make test-clients`.

Every client has a folder here with what it needs (requirements.txt or package.json) and a script
that fails when something is wrong; its last line of output is shown. Each is installed into an
environment of its own under .clients/, and all of them talk to one server with the bundled model.
"""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".clients"
INSTALL_TIMEOUT_S = 900
CLIENT_TIMEOUT_S = 600
START_TIMEOUT_S = 180
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")


class Unavailable(Exception):
    """A client cannot be set up here; the message says why."""


def clients() -> list[str]:
    return sorted(path.name for path in HERE.iterdir() if _needs(path) is not None)


def _needs(folder: Path) -> Path | None:
    """The file that says what a client needs."""
    files = (folder / "requirements.txt", folder / "package.json")
    return next((file for file in files if file.is_file()), None)


def install(client: str) -> list[str]:
    """Sets a client's environment up if it is not yet; returns the command that runs it.

    Raises:
        Unavailable: its interpreter is missing, or the installation fails.
    """
    needs = _needs(HERE / client)
    assert needs is not None
    home = ENVIRONMENTS / client
    stamp = home / "installed"
    wanted = hashlib.sha256(needs.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        (_install_python if needs.suffix == ".txt" else _install_node)(home, needs)
        stamp.write_text(wanted)
    if needs.suffix == ".txt":
        return [str(home / "bin" / "python"), str(HERE / client / "client.py")]
    # Node looks for packages beside the script.
    shutil.copy(HERE / client / "client.mjs", home / "client.mjs")
    return ["node", str(home / "client.mjs")]


def _install_python(home: Path, needs: Path) -> None:
    _checked([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    lines = needs.read_text().splitlines()
    torch = [line for line in lines if line.startswith("torch==")]
    if torch:  # first and alone: nothing else may choose another build of it
        _checked([*pip, *torch])
    _checked([*pip, "-r", str(needs)])


def _install_node(home: Path, needs: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("node and npm are not installed")
    shutil.copy(needs, home / "package.json")
    _checked(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)])


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        raise Unavailable((done.stderr or done.stdout).strip().splitlines()[-1][:200])


@contextmanager
def server() -> Iterator[str]:
    """A server of the bundled model until the end of the body; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(ROOT / ".venv" / "bin" / "expertline"), "up", "--port", str(port)]
    command += ["--stages", "2", "--expert-parallel", "2", "--dtype", "float32"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        _wait_until_ready(process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def _wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("ready "):
            return
        if time.monotonic() > deadline:
            break
    sys.exit("the server did not start:\n" + "".join(said[-20:]))


def run(client: str, url: str) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and what is to be said about it."""
    try:
        command = install(client)
    except (Unavailable, subprocess.TimeoutExpired) as error:
        return "SKIP", f"cannot be installed: {error}"
    environment = {**os.environ, **OFFLINE, "EXPERTLINE_URL": url, "OPENAI_API_KEY": "none"}
    environment |= {"EXPERTLINE_CHECKPOINT": str(ROOT / "model" / "nano" / "checkpoint")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=ENVIRONMENTS / client,
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "FAIL", f"still running after {CLIENT_TIMEOUT_S} s"
    if done.returncode:
        return "FAIL", "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
    return "PASS", (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=clients(), metavar="NAME")
    parser.add_argument("--url", help="a running server with nano in fp32, instead of an own one")
    options = parser.parse_args()
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    with contextmanager(lambda: iter([options.url]))() if options.url else server() as url:
        for client in options.only or clients():
            started = time.monotonic()
            verdict, said = run(client, url)
            counts[verdict] += 1
            print(f"{verdict} {client} {time.monotonic() - started:.0f} s {said}", flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    main()
