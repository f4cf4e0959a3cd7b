"""Which tensors a cell has, and how they come in."""

import pytest
import torch

from model.cache import LatentCache, bytes_per_page
from model.config import CheckpointError
from model.layers import Linear
from model.layout import Cell, Layout
from model.moe import LocalExchange, LocalExperts
from model.stage import Stage
from tests.model.harness import CPU, load
from tests.model.oracle import oracle


def stage_of(name: str, stages: int, ranks: int, cell: Cell) -> Stage:
    config = oracle(name).config
    layout = Layout(config, stages, ranks)
    return Stage(config, layout, cell, torch.float32, CPU, LocalExchange())


@pytest.mark.parametrize("name", ["nano", "like-lite"])
def test_cells_hold_each_tensor_once_and_together_all(name: str) -> None:
    tensors = oracle(name).tensors
    layout = Layout(oracle(name).config, 2, 2)
    holders = dict.fromkeys(tensors, 0)
    for cell in layout.cells:
        stage = stage_of(name, 2, 2, cell)
        for tensor in tensors:
            try:
                stage.load_tensor(tensor, tensors[tensor])
            except KeyError:
                continue
            holders[tensor] += 1
        stage.finalize()
    for tensor, count in holders.items():
        assert count == (1 if ".experts." in tensor else 2), tensor


def test_ends_of_the_model_live_on_the_end_stages() -> None:
    first, last = (stage_of("nano", 2, 1, Cell(stage, 0)) for stage in (0, 1))
    assert first.embedding is not None
    assert first.head is None
    assert last.embedding is None
    assert last.head is not None


def test_weights_take_no_more_memory_than_the_checkpoint() -> None:
    model = oracle("nano")
    stage = stage_of("nano", 1, 1, Cell(0, 0))
    load(stage, model.tensors)
    expected = sum(tensor.numel() for tensor in model.tensors.values())
    held = [*stage.parameters()]
    for module in stage.modules():
        if isinstance(module, Linear):
            held.append(module.weight)
        elif isinstance(module, LocalExperts):
            held.extend(module._packed)
    assert sum(tensor.numel() for tensor in held) == expected


def test_another_shape_than_the_configuration_calls_for_is_refused() -> None:
    stage = stage_of("nano", 1, 1, Cell(0, 0))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\(7,\).*\(256,\)"):
        stage.load_tensor("model.norm.weight", torch.zeros(7))


def test_a_missing_tensor_is_noticed() -> None:
    model = oracle("nano")
    stage = stage_of("nano", 1, 1, Cell(0, 0))
    for name, tensor in model.tensors.items():
        if name != "lm_head.weight":
            stage.load_tensor(name, tensor)
    with pytest.raises(CheckpointError, match=r"1 tensors were not loaded, lm_head\.weight"):
        stage.finalize()


def test_nothing_can_be_loaded_once_loading_has_ended() -> None:
    model = oracle("nano")
    stage = stage_of("nano", 1, 1, Cell(0, 0))
    load(stage, model.tensors)
    with pytest.raises(KeyError):
        stage.load_tensor("lm_head.weight", model.tensors["lm_head.weight"])


def test_bytes_per_page_is_what_the_cache_takes() -> None:
    config = oracle("nano").config
    cache = LatentCache(config, layers=3, pages=5, dtype=torch.bfloat16, device=CPU)
    assert cache.rows.nbytes == 5 * bytes_per_page(config, 3, torch.bfloat16)
    assert cache.layer(1).shape == (5, 64, 576)
