"""The house's arrows: who may import whom, and what nobody may use."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
MODEL_MAY = {"model", "numpy", "torch", "triton", "safetensors", "tokenizers", "transformers"}
MODEL_MAY_IF_INSTALLED = {"triton", "flash_mla", "flashinfer.mla"}
ENGINE_MAY = {"model.sampling_params", "serving.engine"}
BARE_MAY = {"model", "torch", "cupy", "serving.gang.fabric", "serving.engine"}
FORBIDDEN = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def strangers(paths: list[Path], allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in paths
        for module in imports(path)
        if module.split(".")[0] not in STANDARD and not within(module, allowed)
    ]


def test_model_imports_tensors_only() -> None:
    assert strangers(sources("model"), MODEL_MAY) == []


def test_other_peoples_kernels_are_options_that_model_imports_by_name() -> None:
    found = set()
    for path in sources("model"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                found.update(a.value for a in node.args if isinstance(a, ast.Constant))
    assert found == MODEL_MAY_IF_INSTALLED


def test_engine_is_plain_python_but_for_its_driver() -> None:
    paths = [path for path in sources("serving/engine") if path.name != "driver.py"]
    assert strangers(paths, ENGINE_MAY) == []


@pytest.mark.parametrize(
    "file",
    [
        "fabric.py",
        "shared_memory.py",
        "meeting.py",
        "nccl.py",
        "exchange.py",
        "sampling.py",
        "trace.py",
        "contests.py",
        "worker.py",
    ],
)
def test_what_runs_on_a_bare_gpu_machine_needs_no_ray(file: str) -> None:
    own = ("exchange", "grammars", "sampling", "shared_memory", "trace")
    allowed = BARE_MAY | {f"serving.gang.{name}" for name in own}
    assert strangers([ROOT / "serving/gang" / file], allowed) == []


def test_serving_does_not_import_what_stands_on_it() -> None:
    found = [module for path in sources("serving") for module in imports(path)]
    assert not [module for module in found if within(module, {"deploy", "loadtest", "tests"})]


def test_inside_serving_arrows_point_from_ingress_to_gang() -> None:
    """But for what the engine defines for its gang to implement: plans, and the loop's Gang."""
    order = ["ingress", "router", "engine", "gang"]
    contract = {"serving.engine.plan", "serving.engine.loop"}
    wrong = []
    for path in sources("serving"):
        room = path.relative_to(ROOT / "serving").parts[0]
        if room not in order or path.name == "driver.py":
            continue
        above = {f"serving.{name}" for name in order[: order.index(room)]}
        wrong += [
            f"{path.name}: {module}"
            for module in imports(path)
            if within(module, above) and not (room == "gang" and module in contract)
        ]
    assert wrong == []


def test_the_wire_knows_no_room() -> None:
    assert not [m for m in imports(ROOT / "serving/wire.py") if m.startswith("serving")]


def test_nothing_runs_somebody_elses_code() -> None:
    found = []
    for path in sources("model", "serving", "deploy", "loadtest"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{path.name}: {m}" for m in imports(path) if m.split(".")[0] in FORBIDDEN]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in {"eval", "exec", "torch.load", "yaml.load", "os.system"}:
                    found.append(f"{path.name}: {name}")
                if any(k.arg == "trust_remote_code" for k in node.keywords):
                    found.append(f"{path.name}: trust_remote_code")
    assert found == []
