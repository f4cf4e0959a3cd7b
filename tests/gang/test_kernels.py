"""What computes on a rank: forced, or the fastest; and what is compiled."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model import compiling, ops
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.ops import choice, contest
from model.stage import Stage
from serving.gang import contests, kernels
from serving.gang.kernels import compile_stage, fastest_kernels, force_kernels
from serving.gang.messages import RankSpec
from tests.gang.test_building import gpu_spec
from tests.model.harness import CPU, load
from tests.model.oracle import oracle


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    choice.choose("cpu", "auto")


def loaded(dtype: torch.dtype = torch.bfloat16) -> tuple[ModelConfig, Stage]:
    """Nano, its weights as GPUs have them."""
    model = oracle("nano")
    ops.choose("cpu", "reference", ["pack", "pack_heads", "pack_experts", "linear", "linear_heads"])
    layout = Layout(model.config, 1, 1)
    stage = Stage(model.config, layout, Cell(0, 0), dtype, CPU, LocalExchange())
    load(stage, model.tensors)
    return model.config, stage


def messages(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(event)]


@pytest.mark.parametrize("kind", ["flash_mla", "flashinfer", "triton"])
def test_a_kind_that_cannot_run_here_is_the_users_mistake(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_interpreted", lambda: False)
    with pytest.raises(CheckpointError, match=f"gang.kernels {kind}: "):
        force_kernels(gpu_spec(kernels=kind))


class Stopwatch:
    """Every call is as fast as any other, but for those of kinds that are said to be faster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *fast: str) -> None:
        self.fast, self.now = fast, ""
        monkeypatch.setattr(contest, "unfit", lambda kind, device: None)
        monkeypatch.setattr(contest, "offered", self._offered)
        self.asked: list[tuple[str, str]] = []

    def _offered(self, kind: str, operation: str) -> Callable[..., object]:
        self.asked.append((kind, operation))
        reference = choice.offered("reference", operation)
        assert reference is not None

        def compute(*inputs: object) -> object:
            self.now = kind
            return reference(*inputs)

        return compute

    def __call__(self, call: Callable[[], Tensor]) -> float:
        self.now = ""
        call()
        return 0.5 if self.now in self.fast else 1.0


def test_libraries_compete_for_decode_prompts_and_experts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contests, "_CONTEXT", 128)
    choice.choose("cpu", "reference")
    config, stage = loaded()
    watch = Stopwatch(monkeypatch, "flashinfer", "library")
    monkeypatch.setattr(choice, "installed", lambda kind: True)
    spec, recorded = gpu_spec(), []

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        recorded.append(call)
        return call

    with caplog.at_level(logging.INFO, logger="expertline.ops"):
        fastest_kernels(spec, config, stage, capture, watch)
    chosen = [text.rpartition("chosen=")[2] for text in messages(caplog, "ops.contest")]
    assert chosen == ["flashinfer", "library", "library"]
    assert "sizes=1x128,4x128" in messages(caplog, "ops.contest operation=attend_pages")[0]
    assert ("flash_mla", "attend_pages") in watch.asked
    for operation, kind in (("plan_pages", "flashinfer"), ("attend", "library"),
                            ("weighted_experts", "library"), ("merge", "reference")):  # fmt: skip
        assert choice.chosen_for(operation, "cpu")[0] == kind
    assert len(recorded) == 3 * 2 + 2  # decode of three kinds at two sizes; experts of two


@pytest.mark.parametrize("setting", ["forced", "fp32"])
def test_nobody_competes_where_that_was_forced_or_is_not_bf16(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stage = loaded(torch.float32 if setting == "fp32" else torch.bfloat16)
    watch = Stopwatch(monkeypatch)
    spec = gpu_spec(kernels="triton") if setting == "forced" else gpu_spec()
    fastest_kernels(spec, config, stage, lambda call: call, watch)
    assert watch.asked == []


def compiled_spec() -> RankSpec:
    spec = gpu_spec(compile="on")
    assert spec.compile
    assert not gpu_spec().compile
    return spec


def test_the_setting_reaches_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = loaded(torch.float32)[1]
    asked: list[dict[str, object]] = []

    def compile_(forward: Callable[..., object], **options: object) -> Callable[..., object]:
        asked.append(options)
        return forward

    monkeypatch.setattr(compiling.torch, "compile", compile_)
    events: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(
        kernels.log, "event", lambda level, name, **fields: events.append((name, fields))
    )
    compile_stage(gpu_spec(), stage)
    assert (asked, events) == ([], [])
    compile_stage(compiled_spec(), stage)
    assert asked == [{"backend": "inductor", "dynamic": True, "fullgraph": True}] * 2
    assert events == [("rank.compiled", {"cell": "0.0", "parts": 10})]


def test_what_cannot_be_compiled_is_logged_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = loaded(torch.float32)[1]

    def no_compiler(*arguments: object, **options: object) -> object:
        def call(*arguments: object) -> None:
            raise RuntimeError("no g++\nand more")

        return call

    monkeypatch.setattr(compiling.torch, "compile", no_compiler)
    events: list[tuple[str, str, dict[str, object]]] = []
    monkeypatch.setattr(
        kernels.log, "event", lambda level, name, **fields: events.append((level, name, fields))
    )
    compile_stage(compiled_spec(), stage)
    reason = {"cell": "0.0", "reason": "RuntimeError: no g++"}
    assert events == [("WARNING", "rank.not_compiled", reason)]
