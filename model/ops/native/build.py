"""Compiles the kernels for this machine, on first use, and keeps the result.

The same sources are compiled for one of several *instruction sets*, which are named by what they
need as Linux spells it in /proc/cpuinfo.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = tuple(sorted(_FOLDER.glob("*.cpp")))
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 120

Needs = tuple[str, ...]
AVX512: Needs = (
    "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma",
)  # fmt: skip
AVX2: Needs = ("avx2", "fma")


@cache
def instruction_sets() -> tuple[Needs, ...]:
    """Those that this CPU has of what the kernels are written for, the best one first."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    has = set(next((line.split() for line in lines if line.startswith("flags")), []))
    return tuple(needs for needs in (AVX512, AVX2) if has.issuperset(needs))


@cache
def library(needs: Needs) -> ctypes.CDLL | None:
    """The kernels compiled for an instruction set; None without a compiler that can.

    OpenMP's runtime is the one that torch has already loaded: both bear the same name.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    flags = [*_FLAGS, *(f"-m{name.replace('_', '')}" for name in needs)]
    content = [path.read_bytes() for path in (*_SOURCES, *sorted(_FOLDER.glob("*.h")))]
    name = hashlib.sha256(b"\0".join([*content, " ".join(flags).encode()])).hexdigest()[:20]
    path = _cache_folder() / f"kernels-{name}.so"
    if not _is_ours(path) and not _compile([compiler, *flags], path):
        return None
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "expertline"


def _is_ours(path: Path) -> bool:
    """Nobody else could have put this file here: what is loaded is run."""
    try:
        found = [path.parent.stat(), path.stat()]
    except OSError:
        return False
    writable = stat.S_IWGRP | stat.S_IWOTH
    return all(s.st_uid == os.getuid() and not s.st_mode & writable for s in found)


def _compile(compiler: list[str], path: Path) -> bool:
    """Several ranks may ask for it at once: the first one does it, the others wait for that."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (path.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_ours(path):
                _run(compiler, path)
    except (OSError, subprocess.SubprocessError):
        return False
    return _is_ours(path)


def _run(compiler: list[str], path: Path) -> None:
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    command = [*compiler, "-o", made, *map(str, _SOURCES)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        os.chmod(made, 0o700)
        os.replace(made, path)
    finally:
        Path(made).unlink(missing_ok=True)  # of a compiler that failed
