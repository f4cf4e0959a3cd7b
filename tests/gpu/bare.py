"""Python as a GPU machine has it: torch, Triton, CuPy, safetensors, transformers, their needs.

python tests/gpu/bare.py MODULE ARGUMENT...        (runs it as `python -m` does)

What the rest of the stack needs is not to be found in this process, installed or not. ALSO_ABSENT
names more.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Not pydantic, rich and typer: transformers' own command line needs them.
ABSENT = (
    "ray msgspec httpx fastapi starlette uvicorn llguidance prometheus_client hypothesis psutil "
    "openai pytest_asyncio pytest_timeout"
)


class _Found(PathFinder):
    """What is on the path, but for what is absent."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        absent = f"{ABSENT} {os.environ.get('ALSO_ABSENT', '')}".split()
        return None if fullname.partition(".")[0] in absent else super().find_spec(fullname, path)


def main() -> None:
    """The command."""
    sys.meta_path[:] = [_Found if each is PathFinder else each for each in sys.meta_path]
    sys.path[0] = os.getcwd()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
