"""Which tensors a cell of the model needs, and how they come out of a checkpoint.

Names and shapes are those of the published DeepSeek-V2 checkpoints. A cell holds its stage's
layers; of the routed experts it holds its rank's share, of everything else a whole copy.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.shards import Progress, StoredTensor, read_tensor, shard_paths, stored_tensors

NAMED_IN_ERRORS = 3
STORED_AS = (torch.bfloat16, torch.float16, torch.float32)  # what weights may be stored as

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint at a glance, from its headers."""

    config: ModelConfig
    parameters: int
    tensors: int
    bytes: int  # of all tensors
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
) -> Iterator[tuple[str, Tensor]]:
    """Streams one cell's tensors as (name, tensor on CPU of `dtype`), in file order.

    Reads the bytes of these tensors and no others, one tensor at a time. `progress` is told
    how many of how many bytes have been read. All names and shapes are checked before this
    returns. Shards that hold only other cells' tensors need not be there.

    Raises:
        CheckpointError: a tensor is missing or wrongly shaped, or a shard cannot be read.
    """
    shapes = cell_tensors(config, layout, cell)
    stored = stored_tensors(directory, wanted=shapes)
    _compare(directory, shapes, stored)
    return _stream(stored, dtype, progress)


def check(directory: Path, config: ModelConfig) -> None:
    """Makes sure, from headers alone, that a checkpoint is whole and fits its config.

    Raises:
        CheckpointError: one line that names what is wrong and what to do.
    """
    _compare(directory, all_tensors(config), stored_tensors(directory))


def describe(directory: Path) -> Description:
    """What `directory` holds; whether that fits its config is `check`'s question.

    Raises:
        CheckpointError: config.json or the shards cannot be read.
    """
    config = ModelConfig.from_directory(directory)
    stored = {
        name: tensor for name, tensor in stored_tensors(directory).items() if not _derived(name)
    }
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored.values())
    return Description(
        config=config,
        parameters=_elements(tensor.shape for tensor in stored.values()),
        tensors=len(stored),
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


def _stream(
    stored: dict[str, StoredTensor], dtype: torch.dtype, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    total, done = sum(tensor.bytes for tensor in stored.values()), 0
    in_file_order = sorted(stored.items(), key=lambda item: (item[1].path, item[1].offset))
    for path, tensors in groupby(in_file_order, key=lambda item: item[1].path):
        with path.open("rb") as file:
            for name, at in tensors:
                yield name, read_tensor(file, at).to(dtype)
                done += at.bytes
                if progress:
                    progress(done, total)


def _compare(directory: Path, shapes: Shapes, stored: Mapping[str, StoredTensor]) -> None:
    """Raises one line about all that is missing, unexpected, wrongly shaped or quantized."""
    both = shapes.keys() & stored.keys()
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(shapes[name])}"
        for name in shapes
        if name in both and stored[name].shape != shapes[name]
    ]
    foreign = [
        f"{name} {str(stored[name].dtype).removeprefix('torch.')}"
        for name in shapes
        if name in both and stored[name].dtype not in STORED_AS
    ]
    problems = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [name for name in stored if name not in shapes and not _derived(name)],
        "wrongly shaped": misshapen,
        "quantized or not floating-point": foreign,
    }
    found = [_some(kind, names) for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"{directory}: {'; '.join(found)}; see whether config.json belongs to these weights, "
            "or download the checkpoint again"
        )


def _some(kind: str, names: list[str]) -> str:
    shown, more = names[:NAMED_IN_ERRORS], len(names) - NAMED_IN_ERRORS
    return f"{kind}: {', '.join(shown)}" + (f" and {more:,} more" if more > 0 else "")


def _derived(name: str) -> bool:
    """Tables that old exports store although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
