"""Checkpoints in 8-bit floats, in every layout they are published in."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import reading
from model.checkpoint import check, describe, read_cell
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.quantize import FP8, Fp8Weight, fp8_per_block, fp8_per_tensor, from_fp8
from model.quantized_checkpoint import KINDS, is_quantized, write_quantized
from model.random_checkpoint import NANO, write_random
from model.shards import INDEX, SINGLE, read_header
from tests.model.harness import Gang
from tests.model.oracle import oracle
from tests.model.test_parity import random_tokens

FP8_ALL = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"} | weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def per_row(weight: Tensor) -> Fp8Weight:
    """Not a form that is computed with: scales [outputs, 1]."""
    scale = weight.abs().amax(1, keepdim=True).float() / 448
    return Fp8Weight((weight.float() / scale).to(FP8), scale)


# quantization_config, how a matrix is quantized, names and shapes of its companions
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Fp8Weight], str, bool]] = {
    "fp8 by tensor": (FP8_ALL, fp8_per_tensor, "weight_scale", True),
    "fp8 by block": (BLOCKS, fp8_per_block, "weight_scale_inv", False),
    "compressed by tensor": (compressed(strategy="tensor"), fp8_per_tensor, "weight_scale", True),
    "compressed by row": (compressed(strategy="channel"), per_row, "weight_scale", False),
    "compressed by block": (
        compressed(strategy="block", block_structure=[128, 128]),
        fp8_per_block,
        "weight_scale",
        False,
    ),
}


def widened(quantized: Fp8Weight) -> Tensor:
    if quantized.scale.shape == (len(quantized.data), 1):
        return quantized.data.float() * quantized.scale
    return from_fp8(quantized, torch.float32)


def write(directory: Path, layout: str) -> dict[str, Tensor]:
    """Nano in one of the layouts; returns the weights that it stands for."""
    said, quantize, scale_name, inputs_too = LAYOUTS[layout]
    stored, meant = {}, {}
    for name, tensor in load_file(NANO / SINGLE).items():
        stored[name], meant[name] = tensor, tensor.float()
        if not is_quantized(name):
            continue
        quantized = quantize(tensor)
        stored[name], meant[name] = quantized.data, widened(quantized)
        prefix = name.removesuffix("weight")
        stored[prefix + scale_name] = quantized.scale
        if inputs_too:
            stored[prefix + "input_scale"] = torch.ones(())
    directory.mkdir()
    save_file(stored, directory / SINGLE)
    configure(directory, said)
    return meant


def configure(directory: Path, said: dict[str, Any] | None) -> None:
    raw = json.loads((NANO / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": said}))


def read(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    config = ModelConfig.from_directory(directory)
    return dict(read_cell(directory, config, Layout(config, 1, 1), Cell(0, 0), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_checkpoint_is_the_widened_one(layout: str, tmp_path: Path) -> None:
    meant = write(tmp_path / "q", layout)
    config = ModelConfig.from_directory(tmp_path / "q")
    check(tmp_path / "q", config)
    tensors = read(tmp_path / "q")
    in_eight_bits = {name for name, value in tensors.items() if isinstance(value, Fp8Weight)}
    expected = set() if "row" in layout else {name for name in meant if is_quantized(name)}
    assert in_eight_bits == expected
    for name, value in tensors.items():
        wide = from_fp8(value, torch.float32) if isinstance(value, Fp8Weight) else value
        assert torch.equal(wide, meant[name]), name
    tokens = random_tokens(oracle("nano"), 20)
    logits = []
    for weights in (tensors, meant):
        gang = Gang(config, weights)
        live = gang.open(tokens)
        logits.append(gang.advance({live: 20})[live])
    assert torch.equal(*logits)


def test_a_description_tells_weights_from_their_scales(tmp_path: Path) -> None:
    write(tmp_path / "q", "fp8 by tensor")
    found, plain = describe(tmp_path / "q"), describe(NANO)
    assert (found.parameters, found.tensors) == (plain.parameters, plain.tensors)
    matrices = sum(is_quantized(name) for name in load_file(NANO / SINGLE))
    assert found.dtypes == {"float8_e4m3fn": matrices, "bfloat16": plain.tensors - matrices}
    assert found.bytes < 0.7 * plain.bytes


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "kind awq are not supported, only fp8 or compressed"),
        ({"bits": 4}, "kind None are not supported"),
        ("fp8", "kind None are not supported"),
        (BLOCKS | {"weight_block_size": [64, 128]}, r"kind \[64, 128\]"),
        (BLOCKS | {"fmt": "e5m2"}, "kind e5m2"),
        (compressed(num_bits=4, type="int"), r"kind \(4, 'int'\)"),
        (compressed(strategy="block", block_structure=[1, 128]), r"kind \[1, 128\]"),
        ({"quant_method": "compressed-tensors"}, "lacks 'config_groups'"),
    ],
)
def test_other_quantizations_are_refused_in_one_line(
    said: Any, message: str, tmp_path: Path
) -> None:
    configure(tmp_path, said)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_matrices_without_fitting_scales_are_named(tmp_path: Path) -> None:
    write(tmp_path / "q", "fp8 by block")
    tensors = load_file(tmp_path / "q" / SINGLE)
    del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, tmp_path / "q" / SINGLE)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path / "q", ModelConfig.from_directory(tmp_path / "q"))
    assert "missing: model.layers.0.self_attn.o_proj.weight_scale" in str(caught.value)
    assert "scales of model.layers.0.mlp.up_proj.weight [1, 2]" in str(caught.value)
    configure(tmp_path / "q", None)
    with pytest.raises(CheckpointError, match=r"quantized or not floating-point: model\.layers"):
        check(tmp_path / "q", ModelConfig.from_directory(tmp_path / "q"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_quantized_into_shards_that_anybody_can_read(
    kind: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "plain", tmp_path / "quantized"
    write_random("nano", source, layers=2)
    told: list[tuple[int, int]] = []
    write_quantized(source, out, kind, shard_bytes=1_500_000, progress=lambda *p: told.append(p))
    config = ModelConfig.from_directory(out)
    check(out, config)
    index = json.loads((out / INDEX).read_text())
    shards = {shard: load_file(out / shard) for shard in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert told[-1] == (index["metadata"]["total_size"],) * 2 == (describe(out).bytes,) * 2
    for name, shard in index["weight_map"].items():
        assert name in shards[shard]
    plain, quantize = load_file(source / SINGLE), [fp8_per_block, fp8_per_tensor][kind == KINDS[1]]
    for name, value in read(out, torch.bfloat16).items():
        if is_quantized(name):
            expected = quantize(plain[name])
            assert torch.equal(value.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(value.scale, expected.scale)
        else:
            assert torch.equal(value, plain[name])
    raw = json.loads((out / "config.json").read_text())
    said = raw.pop("quantization_config")
    assert raw == json.loads((source / "config.json").read_text())
    apart = said.get("modules_to_not_convert") or said["ignore"]
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.kv_b_proj"} <= {*apart}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    write(tmp_path / "q", "fp8 by block")
    with pytest.raises(CheckpointError, match=r"quantized already \(fp8\)"):
        write_quantized(tmp_path / "q", tmp_path / "again", "fp8-block")
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="not empty"):
        write_quantized(NANO, tmp_path / "q", "fp8-block")


def test_an_interrupted_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_quantized(NANO, tmp_path / "q", "fp8-block", progress=stop)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_directory(tmp_path / "q")


def test_tensors_come_from_several_files_in_turns(tmp_path: Path) -> None:
    write_random("nano", tmp_path / "s", layers=2, shard_bytes=2_500_000)
    index = json.loads((tmp_path / "s" / INDEX).read_text())["weight_map"]
    first = [index[name] for name in read(tmp_path / "s")][:4]
    assert len(set(first)) == 4


def test_a_file_that_shrinks_while_it_is_read_ends_the_reading(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "s")
    config = ModelConfig.from_directory(tmp_path / "s")
    tensors = read_cell(tmp_path / "s", config, Layout(config, 1, 1), Cell(0, 0), torch.float32)
    with (tmp_path / "s" / SINGLE).open("r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(CheckpointError, match="ends in the middle of a tensor"):
        dict(tensors)


class FakeEvent:
    def __init__(self) -> None:
        self.order: list[str] = []

    def synchronize(self) -> None:
        self.order.append("emptied")

    def record(self, stream: object) -> None:
        self.order.append("copied")


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.waits = 0

    def wait_stream(self, other: object) -> None:
        self.waits += 1

    def synchronize(self) -> None:
        self.waits += 1


def test_staging_fills_a_buffer_while_the_other_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a GPU with a CPU in its place: bytes, buffers and their turns."""
    monkeypatch.setattr("torch.cuda.Stream", FakeStream)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    monkeypatch.setattr(reading, "_STAGING_BYTES", 1000)
    monkeypatch.setattr(reading, "_pinned", lambda count: torch.zeros(count, dtype=torch.uint8))
    path = tmp_path / SINGLE
    save_file({"a": torch.arange(1111, dtype=torch.int32)}, path)
    stored = read_header(path)["a"]
    staging = reading._Staging(torch.device("cpu"))
    with path.open("rb") as file:
        whole = staging.bring(file.fileno(), stored)
    assert torch.equal(whole.view(torch.int32), torch.arange(1111, dtype=torch.int32))
    orders = [event.order for _, event in staging._buffers]
    assert orders == [["emptied", "copied"] * 3, ["emptied", "copied"] * 2]
