"""Which implementation runs where: decided once, logged, and forced where somebody wants that."""

import logging
from collections.abc import Iterator

import pytest
import torch

from model import ops
from model.ops import choice, cpu, reference


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    for device in ("cpu", "cuda", "meta"):
        choice.choose(device, "auto")


def test_every_operation_has_a_reference_and_a_signature() -> None:
    for name in choice.OPERATIONS:
        assert callable(getattr(ops, name))
        assert callable(getattr(reference, name))


def test_a_device_runs_what_it_prefers_and_the_reference_where_that_lacks_it() -> None:
    chosen = choice.implementations("cpu")
    assert chosen["attend"] is cpu.attend
    assert chosen["merge"] is reference.merge
    assert choice.implementations("meta")["attend"] is reference.attend


def test_the_choice_is_made_once_and_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    choice.choose("cpu", "auto")
    with caplog.at_level(logging.INFO, logger="expertline.ops"):
        ops.silu_mul(torch.ones(1, 2))
        ops.silu_mul(torch.ones(1, 2))
    (record,) = caplog.records
    words = dict(word.split("=") for word in record.getMessage().split()[1:])
    assert words["device"] == "cpu"
    assert "silu_mul" in words["cpu"].split(",")
    assert "merge" in words["reference"].split(",")


def test_a_forced_kind_runs_for_the_operations_named_until_it_is_left_to_the_device() -> None:
    choice.choose("cpu", "reference", ["attend"])
    assert choice.implementations("cpu")["attend"] is reference.attend
    assert choice.implementations("cpu")["linear"] is cpu.linear
    choice.choose("cpu", "auto")
    assert choice.implementations("cpu")["attend"] is cpu.attend


def test_a_module_does_not_offer_what_it_imported_for_its_own_use() -> None:
    choice.choose("meta", "library")
    chosen = choice.implementations("meta")
    assert chosen["weighted_experts"].__module__ == "model.ops.library"
    assert chosen["attend"].__module__ == "model.ops.library_attention"
    assert chosen["silu_mul"].__module__ not in ("model.ops.library", "model.ops.reference")


@pytest.mark.parametrize(("kind", "operations"), [("fast", ["attend"]), ("cpu", ["atend"])])
def test_unknown_names_are_refused(kind: str, operations: list[str]) -> None:
    with pytest.raises(ValueError, match=r"fast|atend"):
        choice.choose("cpu", kind, operations)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choice.choose("cpu", "triton")


def test_without_triton_a_gpu_runs_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choice._preferred.cache_clear()
    with caplog.at_level(logging.WARNING, logger="expertline.ops"):
        chosen = choice.implementations("cuda")
    choice._preferred.cache_clear()
    assert all(chosen[name] is getattr(reference, name) for name in choice.OPERATIONS)
    assert [record.getMessage() for record in caplog.records] == ["ops.no_triton device=cuda"]
