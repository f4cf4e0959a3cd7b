"""What libraries and our own kernels compete in when a rank starts, at the sizes of its steps."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.config import ModelConfig
from model.graphs import Capture
from model.moe import LocalExperts
from model.ops.choice import Implementation
from model.ops.contest import Contest, Size
from model.stage import Stage

_CONTEXT = 4096  # tokens, of sequences that decode and of prompts
_BATCH = 64  # sequences


def contests(
    config: ModelConfig,
    stage: Stage,
    step_tokens: int,
    sequences: int,
    plain_cache: bool,
    capture: Capture,
) -> Iterator[Contest]:
    """Those that a loaded stage in bf16 gives rise to.

    Args:
        step_tokens: rows of the largest step.
        sequences: rows of the largest decode step.
        plain_cache: whether the cache is in bf16, which is all that libraries take.
        capture: how decode is recorded.
    """
    device = next(stage.parameters()).device
    rows, batch = min(step_tokens, _CONTEXT), min(sequences, _BATCH)
    if plain_cache:
        layers = len(stage.layers)
        sizes = [_decode(config, each, layers, device, capture) for each in sorted({1, batch})]
        operations = ("attend_pages", "plan_pages")
        yield Contest(operations, ("flash_mla", "flashinfer"), tuple(sizes))
    yield Contest(("attend",), ("library",), (_chunk(config, rows, device),))
    experts = next((each for each in stage.modules() if isinstance(each, LocalExperts)), None)
    if experts is not None and experts.plain:
        few = _experts(config, experts, batch, device, capture)
        many = _experts(config, experts, rows, device, not_recorded)
        yield Contest(("weighted_experts",), ("library",), (few, many))


def _decode(
    config: ModelConfig, batch: int, layers: int, device: torch.device, capture: Capture
) -> Size:
    """A step's attention in all layers of a stage, over pages in disorder."""
    width = _CONTEXT // PAGE_TOKENS
    count = batch * width
    cache = _normal(count + 1, PAGE_TOKENS, config.latent_dim, device=device)
    query = _normal(batch, config.num_attention_heads, config.latent_dim, device=device)
    pages = (torch.randperm(count, device=device) + 1).view(batch, width)
    lengths = torch.full((batch,), _CONTEXT, device=device)
    out = torch.empty_like(query[..., : config.kv_lora_rank])

    def call(implementations: Sequence[Implementation]) -> Callable[[], Tensor]:
        attend, plan = implementations

        def all_layers() -> None:
            for _ in range(layers):
                found = attend(
                    query, cache, pages, lengths, config.kv_lora_rank, config.softmax_scale
                )
            out.copy_(found)

        plan(pages, lengths, True)
        replay = capture(all_layers)

        def step() -> Tensor:
            plan(pages, lengths, True)
            replay()
            return out.clone()

        return step

    return Size(f"{batch}x{_CONTEXT}", call)


def _chunk(config: ModelConfig, rows: int, device: torch.device) -> Size:
    """A whole prompt's attention."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    query = _normal(rows, heads, config.qk_head_dim, device=device)
    key = _normal(rows, heads, nope, device=device)
    shared = _normal(rows, config.qk_rope_head_dim, device=device)
    value = _normal(rows, heads, config.v_head_dim, device=device)

    def call(implementations: Sequence[Implementation]) -> Callable[[], Tensor]:
        (attend,) = implementations
        inputs = (query, key, shared, value, config.softmax_scale, True)
        return lambda: attend(*inputs)[0]

    return Size(str(rows), call)


def _experts(
    config: ModelConfig, experts: LocalExperts, rows: int, device: torch.device, capture: Capture
) -> Size:
    """One layer's routed experts, each row's chosen by chance."""
    hidden = _normal(rows, config.hidden_size, device=device)
    chance = torch.rand(rows, config.n_routed_experts, device=device)
    weights, ids = chance.softmax(-1).topk(config.num_experts_per_tok)
    out = torch.empty_like(hidden)

    def call(implementations: Sequence[Implementation]) -> Callable[[], Tensor]:
        (weighted,) = implementations

        def layer() -> None:
            out.copy_(experts.by(weighted, hidden, ids, weights))

        replay = capture(layer)

        def step() -> Tensor:
            replay()
            return out.clone()

        return step

    return Size(str(rows), call)


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def not_recorded(call: Callable[[], None]) -> Callable[[], None]:
    return call
