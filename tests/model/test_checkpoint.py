"""Checkpoints: which cell needs what, exact reads, and refusal of all that is not whole."""

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.checkpoint import (
    all_tensors,
    cell_bytes,
    cell_tensors,
    check,
    describe,
    read_cell,
)
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.random_checkpoint import NANO, SHAPES, write_random
from model.shards import INDEX, SINGLE, read_header

PUBLISHED = {  # shape: (parameters, tensors, layouts to try)
    "236b": (235_741_434_880, 29_102, [(1, 1), (1, 8), (2, 8), (7, 4), (60, 1)]),
    "lite": (15_706_484_224, 5_291, [(1, 1), (2, 2), (3, 16), (27, 1)]),
}


@pytest.fixture(scope="module")
def nano() -> ModelConfig:
    return ModelConfig.from_directory(NANO)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of nano in shards of at most 1 MB; tests that change it copy it."""
    directory = tmp_path_factory.mktemp("checkpoint") / "cut"
    write_random("nano", directory, layers=2, shard_bytes=1_000_000)
    return directory


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def one_shard(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / SINGLE)
    return directory


def elements(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("shape", PUBLISHED)
def test_published_models_have_the_published_counts(shape: str) -> None:
    parameters, tensors, _ = PUBLISHED[shape]
    shapes = all_tensors(ModelConfig.from_dict(SHAPES[shape]))
    assert (elements(shapes), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("shape", "stages", "ranks"),
    [(shape, *layout) for shape, (_, _, layouts) in PUBLISHED.items() for layout in layouts],
)
def test_cells_together_hold_the_model_and_each_expert_once(
    shape: str, stages: int, ranks: int
) -> None:
    config = ModelConfig.from_dict(SHAPES[shape])
    layout = Layout(config, stages, ranks)
    whole, union = all_tensors(config), {}
    holders: dict[str, set[Cell]] = {}
    for cell in layout.cells:
        shapes = cell_tensors(config, layout, cell)
        union |= shapes
        for name in shapes:
            holders.setdefault(name, set()).add(cell)
    assert union == whole
    for name, cells in holders.items():
        assert len(cells) == (1 if ".experts." in name else ranks)
        assert len({cell.stage for cell in cells}) == 1


def test_the_236b_weighs_what_is_known() -> None:
    config = ModelConfig.from_dict(SHAPES["236b"])
    whole, eight = Layout(config, 1, 1), Layout(config, 1, 8)
    assert cell_bytes(config, whole, Cell(0, 0), torch.bfloat16) / 1e9 == pytest.approx(471.5, 1e-3)
    sizes = {cell_bytes(config, eight, cell, torch.bfloat16) for cell in eight.cells}
    assert len(sizes) == 1
    assert sizes.pop() / 1e9 == pytest.approx(81.7, rel=5e-3)


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2), (5, 4)])
def test_cells_read_exactly_their_tensors(nano: ModelConfig, stages: int, ranks: int) -> None:
    layout, stored = Layout(nano, stages, ranks), load_file(NANO / SINGLE)
    seen = set()
    for cell in layout.cells:
        progress: list[tuple[int, int]] = []
        tensors = dict(
            read_cell(NANO, nano, layout, cell, torch.float32, lambda *p, to=progress: to.append(p))
        )
        assert {n: tuple(t.shape) for n, t in tensors.items()} == cell_tensors(nano, layout, cell)
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[name].float())
        total = cell_bytes(nano, layout, cell, torch.bfloat16)
        assert progress[-1] == (total, total)
        assert progress == sorted(progress)
        seen |= tensors.keys()
    assert seen == stored.keys()


def test_a_cell_needs_only_the_shards_that_hold_its_tensors(cut: Path, tmp_path: Path) -> None:
    directory = copy(cut, tmp_path / "node")
    config = ModelConfig.from_directory(directory)
    layout, cell = Layout(config, 2, 1), Cell(1, 0)
    needed = {
        path.name
        for path in directory.glob("*.safetensors")
        if read_header(path).keys() & cell_tensors(config, layout, cell).keys()
    }
    for path in directory.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    names = [name for name, _ in read_cell(directory, config, layout, cell, torch.bfloat16)]
    assert sorted(names) == sorted(cell_tensors(config, layout, cell))
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors: No such file"):
        check(directory, config)


def test_whole_checkpoints_pass_and_tables_of_old_exports_are_ignored(
    nano: ModelConfig, cut: Path, tmp_path: Path
) -> None:
    check(NANO, nano)
    check(cut, ModelConfig.from_directory(cut))
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    check(one_shard(tmp_path / "old", load_file(NANO / SINGLE) | table), nano)


def test_wrong_tensors_are_named_in_one_line(nano: ModelConfig, tmp_path: Path) -> None:
    tensors = load_file(NANO / SINGLE)
    for expert in range(5):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    tensors["model.norm.bias"] = torch.ones(256)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].contiguous()
    name = "model.layers.2.mlp.gate.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    directory = one_shard(tmp_path / "wrong", tensors)
    with pytest.raises(CheckpointError) as caught:
        check(directory, nano)
    message = str(caught.value)
    assert "\n" not in message
    assert "experts.0.up_proj.weight" in message
    assert "and 2 more" in message
    assert "unexpected: model.norm.bias" in message
    assert "lm_head.weight [100, 256] instead of [4096, 256]" in message
    assert f"{name} float8_e4m3fn" in message
    with pytest.raises(CheckpointError, match="lm_head"):
        read_cell(directory, nano, Layout(nano, 2, 1), Cell(1, 0), torch.float32)


@pytest.mark.parametrize("keep", [-1, 1000, 8, 3, 0])
def test_truncated_shards_are_refused(nano: ModelConfig, tmp_path: Path, keep: int) -> None:
    whole = (NANO / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|not a whole safetensors file"):
        check(tmp_path, nano)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "..", 7, None],
)
def test_an_index_cannot_leave_its_directory(
    nano: ModelConfig, tmp_path: Path, shard: object
) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(CheckpointError, match="not the plain name"):
        check(tmp_path, nano)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_a_bad_index_is_refused(nano: ModelConfig, tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        check(tmp_path, nano)


def test_a_tensor_that_is_not_where_the_index_says_is_named(cut: Path, tmp_path: Path) -> None:
    directory = copy(cut, tmp_path / "lying")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-" + sorted(
        path.name for path in directory.glob("*.safetensors")
    )[0].removeprefix("model-00001-of-")
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        check(directory, ModelConfig.from_directory(directory))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(nano: ModelConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never looked at")
    with pytest.raises(CheckpointError, match="pickled weights"):
        check(tmp_path, nano)


def test_directories_without_weights_say_what_is_lacking(nano: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a checkpoint with safetensors"):
        check(tmp_path, nano)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"shards without model\.safetensors\.index\.json"):
        check(tmp_path, nano)


HEADERS = {
    "gap": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}},
    "overlap": {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
    },
    "size": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 3]}},
    "negative": {"a": {"dtype": "U8", "shape": [-3], "data_offsets": [3, 0]}},
    "dtype": {"a": {"dtype": "F3", "shape": [3], "data_offsets": [0, 3]}},
    "fields": {"a": {"dtype": "U8"}},
    "list": [1, 2, 3],
    "number": {"a": 3},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie_are_refused(tmp_path: Path, kind: str) -> None:
    header = json.dumps(HEADERS[kind]).encode()
    path = tmp_path / SINGLE
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(CheckpointError):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    with suppress(CheckpointError):
        read_header(path)


def test_a_description_counts_what_is_there(cut: Path) -> None:
    nano, shards = describe(NANO), describe(cut)
    assert nano.parameters == elements(all_tensors(nano.config))
    assert nano.bytes == 2 * nano.parameters
    assert nano.dtypes == {"bfloat16": nano.tensors}
    assert list(nano.shards) == [SINGLE]
    assert shards.tensors == len(all_tensors(shards.config))
    assert len(shards.shards) > 1
    assert sum(shards.shards.values()) > shards.bytes
