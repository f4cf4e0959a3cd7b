"""Triton kernels on a machine without a GPU: interpreted, and compiled for one.

Triton decides on its import whether it interprets, so each file of tests runs in a process of its
own. The interpreter shows indexing, masks and sums in fp32 and fp16; its bf16 products are
garbage, and there compiling must do until a GPU is at hand (tests/gpu).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels"
ROOT = Path(__file__).parents[2]
LIMIT_S = 570  # of seconds on a quiet core, each takes a tenth at most

pytestmark = pytest.mark.timeout(LIMIT_S + 30)


def run(file: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("interpreted_*.py")))
def test_kernels_compute_what_the_reference_does(name: str) -> None:
    run(FOLDER / f"{name}.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("compiled_*.py")))
def test_kernels_compile_for_a_gpu(name: str, tmp_path: Path) -> None:
    run(FOLDER / f"{name}.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
