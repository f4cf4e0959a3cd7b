"""Which tensors a cell of the model needs, and how they come out of a checkpoint.

Names and shapes are those of the published DeepSeek-V2 checkpoints. A cell holds its stage's
layers; of the routed experts it holds its rank's share, of everything else a whole copy.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.quantize import FP8
from model.reading import StoredWeight, read_weights, scale_shapes
from model.shards import Progress, StoredTensor, shard_paths, stored_tensors
from model.weights import Value

NAMED_IN_ERRORS = 3
# Beside a matrix `x.weight` in 8-bit floats: its scales, under one of these names, …
SCALES = ("weight_scale", "weight_scale_inv")
# … and what other engines want to know, but what is computed here does not need.
UNUSED = ("input_scale", "output_scale", "k_scale", "v_scale", "kv_scale")
STORED_AS = (torch.bfloat16, torch.float16, torch.float32)  # what weights may be stored as

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint at a glance, from its headers."""

    config: ModelConfig
    parameters: int
    tensors: int  # weights; their scales are not counted
    bytes: int  # of both
    shards: dict[str, int]  # file name -> bytes
    dtypes: dict[str, int]  # name as in "bfloat16" -> tensors stored so


def cell_tensors(config: ModelConfig, layout: Layout, cell: Cell) -> Shapes:
    """Names and shapes of exactly the tensors that one cell computes with."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: Shapes = {}
    if layout.has_embedding(cell.stage):
        shapes["model.embed_tokens.weight"] = (vocab, hidden)
    for layer in layout.layers(cell.stage):
        shapes |= _layer(config, layer, layout.experts(cell.rank))
    if layout.has_head(cell.stage):
        shapes["model.norm.weight"] = (hidden,)
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def all_tensors(config: ModelConfig) -> Shapes:
    """Names and shapes of the whole model's tensors."""
    return cell_tensors(config, Layout(config, stages=1, ranks=1), Cell(0, 0))


def cell_bytes(config: ModelConfig, layout: Layout, cell: Cell, dtype: torch.dtype) -> int:
    """Bytes of a cell's weights, were all of them of `dtype`."""
    return _elements(cell_tensors(config, layout, cell).values()) * dtype.itemsize


def read_cell(
    directory: Path,
    config: ModelConfig,
    layout: Layout,
    cell: Cell,
    dtype: torch.dtype,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, Value]]:
    """Streams one cell's tensors as (name, tensor on `device` of `dtype` or of 8-bit floats).

    Reads the bytes of these tensors and no others, a few at a time. `progress` is told how many
    of how many bytes have been read. All names and shapes are checked before this returns.
    Shards that hold only other cells' tensors need not be there.

    Raises:
        CheckpointError: a tensor is missing or wrongly shaped, or a shard cannot be read.
    """
    shapes = cell_tensors(config, layout, cell)
    scales = [scale for name in shapes for scale in _scale_names(name)]
    stored = stored_tensors(directory, wanted=[*shapes, *scales])
    weights = _weights(directory, config, shapes, stored)
    return read_weights(weights, dtype, torch.device(device), progress)


def check(directory: Path, config: ModelConfig) -> None:
    """Makes sure, from headers alone, that a checkpoint is whole and fits its config.

    Where weights are random and made by the ranks, there is nothing to read.

    Raises:
        CheckpointError: one line that names what is wrong and what to do.
    """
    if config.random_seed is not None:
        return
    _weights(directory, config, all_tensors(config), stored_tensors(directory))


def describe(directory: Path) -> Description:
    """What `directory` holds; whether that fits its config is `check`'s question.

    Raises:
        CheckpointError: config.json or the shards cannot be read.
    """
    config = ModelConfig.from_directory(directory)
    stored = {n: tensor for n, tensor in stored_tensors(directory).items() if not _derived(n)}
    weights = [tensor for name, tensor in stored.items() if not _companion(name)]
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights)
    return Description(
        config=config,
        parameters=_elements(tensor.shape for tensor in weights),
        tensors=len(weights),
        bytes=sum(tensor.bytes for tensor in stored.values()),
        shards={path.name: path.stat().st_size for path in shard_paths(directory)},
        dtypes=dict(dtypes),
    )


def _layer(config: ModelConfig, layer: int, experts: range) -> Shapes:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}."
    shapes: Shapes = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    shapes |= _attention(config, f"{prefix}self_attn.")
    if config.is_dense(layer):
        return shapes | _mlp(f"{prefix}mlp.", hidden, config.intermediate_size)
    inner = config.moe_intermediate_size
    shapes[f"{prefix}mlp.gate.weight"] = (config.n_routed_experts, hidden)
    for expert in experts:
        shapes |= _mlp(f"{prefix}mlp.experts.{expert}.", hidden, inner)
    if config.n_shared_experts:
        shapes |= _mlp(f"{prefix}mlp.shared_experts.", hidden, inner * config.n_shared_experts)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> Shapes:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query, rank = heads * config.qk_head_dim, config.q_lora_rank
    shapes: Shapes
    if rank is None:
        shapes = {f"{prefix}q_proj.weight": (query, hidden)}
    else:
        shapes = {
            f"{prefix}q_a_proj.weight": (rank, hidden),
            f"{prefix}q_a_layernorm.weight": (rank,),
            f"{prefix}q_b_proj.weight": (query, rank),
        }
    expansion = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return shapes | {
        f"{prefix}kv_a_proj_with_mqa.weight": (config.latent_dim, hidden),
        f"{prefix}kv_a_layernorm.weight": (latent,),
        f"{prefix}kv_b_proj.weight": (expansion, latent),
        f"{prefix}o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def _weights(
    directory: Path, config: ModelConfig, shapes: Shapes, stored: dict[str, StoredTensor]
) -> dict[str, StoredWeight]:
    """Where the tensors of `shapes` lie, each with its scales.

    Raises:
        CheckpointError: one line about all that is missing, unexpected, wrongly shaped or stored
            in a way that cannot be read.
    """
    missing, misshapen, foreign = [], [], []
    weights = {}
    for name, shape in shapes.items():
        tensor = stored.get(name)
        if tensor is None:
            missing.append(name)
            continue
        weights[name] = StoredWeight(tensor)
        if tensor.shape != shape:
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        elif config.quantization and tensor.dtype == FP8 and len(shape) == 2:
            scale = next((stored[n] for n in _scale_names(name) if n in stored), None)
            weights[name] = StoredWeight(tensor, scale)
            if scale is None:
                missing.append(_scale_names(name)[0])
            elif scale.shape not in scale_shapes(shape):
                misshapen.append(f"scales of {name} {list(scale.shape)}")
        elif tensor.dtype not in STORED_AS:
            foreign.append(f"{name} {str(tensor.dtype).removeprefix('torch.')}")
    problems = {
        "missing": missing,
        "unexpected": [
            name
            for name in stored
            if name not in shapes
            and not _derived(name)
            and not (config.quantization and _companion(name))
        ],
        "wrongly shaped": misshapen,
        "quantized or not floating-point": foreign,
    }
    found = [_some(kind, names) for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{directory}: {'; '.join(found)}; see whether config.json belongs to these weights, "
            "or download the checkpoint again"
        )
    return weights


def _scale_names(name: str) -> list[str]:
    return [name.removesuffix("weight") + scale for scale in SCALES]


def _companion(name: str) -> bool:
    """Whether this is no weight, but belongs to one in 8-bit floats."""
    return name.rpartition(".")[2] in (*SCALES, *UNUSED)


def _some(kind: str, names: list[str]) -> str:
    shown, more = names[:NAMED_IN_ERRORS], len(names) - NAMED_IN_ERRORS
    return f"{kind}: {', '.join(shown)}" + (f" and {more:,} more" if more > 0 else "")


def _derived(name: str) -> bool:
    """Tables that old exports store although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
