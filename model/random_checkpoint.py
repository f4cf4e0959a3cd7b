"""Random checkpoints in the exact Hugging Face layout, for what cannot be shipped.

They load wherever a real checkpoint of the same shape does and run at its speed; the text that
comes out is noise. The bundled model's tokenizer comes with every shape, so that a random
checkpoint serves at once: its tokens are the first ids of the vocabulary, and begin and end of
sequence are its ids.
"""

import json
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import STORED_AS, all_tensors, cell_tensors
from model.config import RANDOM_SEED, CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.shards import Progress
from model.writing import TensorSpec, new_directory, write_shards

GIB = 2**30
NANO = Path(__file__).parent / "nano" / "checkpoint"
STD = 0.02

_COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "initializer_range": STD,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_GROUPED = {"topk_method": "group_limited_greedy"}

SHAPES: dict[str, dict[str, Any]] = {
    "nano": _COMMON
    | _GROUPED
    | {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "intermediate_size": 768,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "bos_token_id": 4091,
        "eos_token_id": 4092,
    },
    "bench-1b": _COMMON
    | _GROUPED
    | {
        "vocab_size": 16384,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "intermediate_size": 2816,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "bos_token_id": 4091,
        "eos_token_id": 4092,
    },
    "lite": _COMMON
    | {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "rope_scaling": _COMMON["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
    "236b": _COMMON
    | _GROUPED
    | {
        "vocab_size": 102400,
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
}


def write_random(
    shape: str,
    directory: Path,
    layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 4 * GIB,
    progress: Progress | None = None,
    weights: bool = True,
) -> None:
    """Writes a random checkpoint of one of `SHAPES`, cut to `layers` layers if given.

    Streams: a few tensors are in memory at a time. config.json is written last, so that what
    an interrupted run leaves behind is never taken for a checkpoint.

    Args:
        weights: whether to write them. Without, config.json says that each rank makes its own by
            `random_cell`: for models that are larger than the disk, or than one's patience.

    Raises:
        CheckpointError: unknown shape, dtype or number of layers; the directory is not empty,
            or the disk is too small.
    """
    raw = _config(shape, layers, dtype)
    config = ModelConfig.from_dict(raw, source=shape)
    if weights:
        specs = {name: TensorSpec(dtype, size) for name, size in all_tensors(config).items()}
        new_directory(directory, sum(spec.bytes for spec in specs.values()))

        def make(name: str) -> dict[str, Tensor]:
            layers = config.num_hidden_layers
            return {name: _random(name, specs[name].shape, seed, dtype, layers)}

        write_shards(directory, {n: {n: s} for n, s in specs.items()}, make, shard_bytes, progress)
    else:
        new_directory(directory, 0)
        raw |= {RANDOM_SEED: seed}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(NANO / name, directory / name)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def random_cell(
    config: ModelConfig,
    layout: Layout,
    cell: Cell,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """One cell's tensors as (name, tensor of `dtype`), made on `device` one after the other.

    In the order of a checkpoint, without one: no file is read or written. On CPUs they are those
    that `write_random` writes; each kind of device has numbers of its own.
    """
    for name, shape in cell_tensors(config, layout, cell).items():
        yield name, _random(name, shape, seed, dtype, config.num_hidden_layers, device)


def _config(shape: str, layers: int | None, dtype: torch.dtype) -> dict[str, Any]:
    if shape not in SHAPES:
        raise CheckpointError(f"no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    if dtype not in STORED_AS:
        raise CheckpointError(f"{dtype}: choose bfloat16, float16 or float32")
    raw = SHAPES[shape]
    whole = raw["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= whole:
        raise CheckpointError(f"{layers} layers: {shape} has {whole}, choose 1 to {whole}")
    return raw | {
        "num_hidden_layers": layers or whole,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": SHAPES["nano"]["bos_token_id"],
        "eos_token_id": SHAPES["nano"]["eos_token_id"],
    }


def _random(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype,
    layers: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The tensor `name`, a pure function of the arguments.

    Norms are one, so they keep their input's direction. What is added to the residual stream
    shrinks with depth, so that its variance does not grow with the number of layers.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype, device=device)
    adds = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = STD * (2 * layers) ** -0.5 if adds else STD
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
