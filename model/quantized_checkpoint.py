"""Checkpoints of 8-bit floats, made of others.

Two layouts that other engines read as well: by block, as DeepSeek-V3 was published, and by
matrix, as compressed-tensors writes it. Quantized is what the network multiplies by: not the
embedding, the head and the gates, nor `kv_b_proj`, which attention takes apart.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import all_tensors, check
from model.config import CheckpointError, ModelConfig
from model.quantize import BLOCK, FP8, Fp8Weight, block_shape, fp8_per_block, fp8_per_tensor
from model.shards import (
    INDEX,
    PICKLED,
    Progress,
    StoredTensor,
    read_into,
    stored_tensors,
)
from model.writing import TensorSpec, new_directory, write_shards

GIB = 2**30
KINDS = ("fp8-block", "fp8-tensor")

_QUANTIZE: dict[str, Callable[[Tensor], Fp8Weight]] = {
    "fp8-block": fp8_per_block,
    "fp8-tensor": fp8_per_tensor,
}
_SCALE = {"fp8-block": "weight_scale_inv", "fp8-tensor": "weight_scale"}


def is_quantized(name: str) -> bool:
    """Whether the tensor `name` is in 8-bit floats in the checkpoints that are made here."""
    matrix = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
    return matrix and not name.endswith("kv_b_proj.weight")


def write_quantized(
    source: Path,
    directory: Path,
    kind: str,
    shard_bytes: int = 4 * GIB,
    progress: Progress | None = None,
) -> None:
    """Writes the checkpoint `source` once more, its matrices in 8-bit floats.

    Streams: a few tensors are in memory at a time. config.json is written last, so that what an
    interrupted run leaves behind is never taken for a checkpoint.

    Args:
        kind: one of `KINDS`: a scale for each block of 128 × 128, or for each matrix.

    Raises:
        CheckpointError: `source` is not whole or quantized already, or `directory` is not empty
            or on too small a disk.
    """
    config = ModelConfig.from_directory(source)
    check(source, config)
    if config.quantization:
        raise CheckpointError(f"{source}: quantized already ({config.quantization})")
    stored = stored_tensors(source, wanted=all_tensors(config))
    groups = {name: _specs(name, at, kind) for name, at in stored.items()}
    new_directory(directory, sum(s.bytes for specs in groups.values() for s in specs.values()))
    files = {path: os.open(path, os.O_RDONLY) for path in {at.path for at in stored.values()}}

    def make(name: str) -> dict[str, Tensor]:
        at = stored[name]
        buffer = torch.empty(at.bytes, dtype=torch.uint8)
        read_into(buffer, files[at.path], at)
        tensor = buffer.view(at.dtype).reshape(at.shape)
        if not is_quantized(name):
            return {name: tensor}
        data, scale = _QUANTIZE[kind](tensor)
        scale_name = _scale_name(name, kind)
        return {name: data, scale_name: scale.reshape(groups[name][scale_name].shape)}

    try:
        write_shards(directory, groups, make, shard_bytes, progress)
    finally:
        for file in files.values():
            os.close(file)
    _copy_the_rest(source, directory)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plain = [n.removesuffix(".weight") for n in stored if len(stored[n].shape) == 2]
    plain = [name for name in plain if not is_quantized(f"{name}.weight")]
    raw["quantization_config"] = _SAID[kind](plain)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _specs(name: str, at: StoredTensor, kind: str) -> dict[str, TensorSpec]:
    if not is_quantized(name):
        return {name: TensorSpec(at.dtype, at.shape)}
    scales = block_shape(at.shape) if kind == "fp8-block" else (1,)
    return {
        name: TensorSpec(FP8, at.shape),
        _scale_name(name, kind): TensorSpec(torch.float32, scales),
    }


def _scale_name(name: str, kind: str) -> str:
    return name.removesuffix("weight") + _SCALE[kind]


def _copy_the_rest(source: Path, directory: Path) -> None:
    """Tokenizer, generation defaults and whatever else lies beside the weights."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", *PICKLED) or path.name == INDEX
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, directory / path.name)


def _by_block(plain: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": plain,
    }


def _by_matrix(plain: list[str]) -> dict[str, Any]:
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "tensor", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": plain,
    }


_SAID = {"fp8-block": _by_block, "fp8-tensor": _by_matrix}
