"""Other people's clients against this server: `make test-clients`.

Every client has a folder here with what it needs (requirements.txt, or package.json and its lock)
and a script that fails when something is wrong; its last line of output is shown. Each is
installed once into an environment of its own under .clients/, and all of them talk to one server
with the bundled model.
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
from contextlib import contextmanager, nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".clients"
CHECKPOINT = ROOT / "model" / "nano" / "checkpoint"
INSTALL_TIMEOUT_S = 900
CLIENT_TIMEOUT_S = 600
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
POLL_S = 0.2
TAIL_LINES = 40
NODE_MAJOR = 20
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
}


class Unavailable(Exception):
    """A client cannot be set up here; the message says why."""


def clients() -> list[str]:
    return sorted(path.name for path in HERE.iterdir() if _needs(path))


def _needs(folder: Path) -> list[Path]:
    """The files that say what a client needs."""
    names = ("requirements.txt", "package.json", "package-lock.json")
    return [folder / name for name in names if (folder / name).is_file()]


def install(client: str) -> list[str]:
    """Sets a client's environment up if it is not yet; returns the command that runs it.

    Raises:
        Unavailable: its interpreter is missing, or the installation fails.
    """
    needs = _needs(HERE / client)
    home = ENVIRONMENTS / client
    in_python = needs[0].name == "requirements.txt"
    if not in_python:
        _require_node()
    stamp = home / "installed"
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in needs)).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        if in_python:
            _install_python(home, needs[0])
        else:
            _install_node(home, needs)
        stamp.write_text(wanted)
    if in_python:
        return [str(home / "bin" / "python"), str(HERE / client / "client.py")]
    # Node looks for packages beside the script.
    shutil.copy(HERE / client / "client.mjs", home / "client.mjs")
    return ["node", str(home / "client.mjs")]


def _install_python(home: Path, needs: Path) -> None:
    _checked([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    torch = [line for line in needs.read_text().splitlines() if line.startswith("torch==")]
    if torch:  # first and alone: nothing else may choose another build of it
        _checked([*pip, *torch])
    _checked([*pip, "-r", str(needs)])


def _install_node(home: Path, needs: list[Path]) -> None:
    for file in needs:
        shutil.copy(file, home)
    _checked(["npm", "ci", "--silent", "--no-audit", "--no-fund", "--prefix", str(home)])


def _require_node() -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise Unavailable("node and npm are not installed")
    said = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    if int(said.removeprefix("v").partition(".")[0]) < NODE_MAJOR:
        raise Unavailable(f"node {NODE_MAJOR} is needed, this is {said}")


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise Unavailable(f"installation failed: {said[-1][:200]}")


@contextmanager
def server() -> Iterator[str]:
    """A server of the bundled model until the end of the body; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(ROOT / ".venv" / "bin" / "expertline"), "up", "--model", "nano"]
    command += ["--stages", "2", "--expert-parallel", "2", "--dtype", "float32"]
    ENVIRONMENTS.mkdir(exist_ok=True)
    log = ENVIRONMENTS / "server.log"  # not a pipe: nobody would read it
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if any(line.startswith("ready ") for line in log.read_text().splitlines()):
            return
        time.sleep(POLL_S)
    sys.exit("the server did not start:\n" + _tail(log.read_text()))


def run(client: str, url: str) -> tuple[str, str]:
    """PASS, FAIL or SKIP, and what is to be said about it."""
    try:
        command = install(client)
    except (Unavailable, subprocess.TimeoutExpired) as error:
        return "SKIP", str(error)
    environment = {
        **os.environ,
        **OFFLINE,
        "EXPERTLINE_URL": url,
        "EXPERTLINE_CHECKPOINT": str(CHECKPOINT),
        "OPENAI_API_KEY": "none",
        "HF_HOME": str(ENVIRONMENTS / client / "huggingface"),
    }
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
        return "FAIL", "\n" + _tail(f"{done.stdout}\n{done.stderr}")
    return "PASS", (done.stdout.strip().splitlines() or [""])[-1]


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=clients(), metavar="NAME")
    parser.add_argument("--url", help="a running server with nano in fp32, instead of an own one")
    options = parser.parse_args()
    counts = {"PASS": 0, "FAIL": 0, "SKIP": 0}
    with nullcontext(options.url) if options.url else server() as url:
        for client in options.only or clients():
            started = time.monotonic()
            verdict, said = run(client, url)
            counts[verdict] += 1
            print(f"{verdict} {client} {time.monotonic() - started:.0f} s {said}", flush=True)
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    main()
