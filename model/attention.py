"""Multi-head latent attention, in its two equal forms.

The cache holds one row a token: its latent and a rotated key. *Expanded*, a latent becomes
each head's key and value, which pays when many queries share it. *Absorbed*, the expansion
moves into the query and into the output, and attention runs over the latents as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import ops
from model.config import ModelConfig
from model.context import Chunk, StepContext
from model.layers import Linear, RMSNorm
from model.weights import Rows, Slot, WeightFormat, weight

# Elements of expanded past at a time: 4 Ki tokens at 16 heads, 512 tokens at 128 heads.
_EXPANDED_ELEMENTS = 2**24


class Query(nn.Module):
    """Hidden states to each head's query, through a normed latent or directly."""

    def __init__(self, config: ModelConfig, form: WeightFormat) -> None:
        super().__init__()
        hidden, rank, eps = config.hidden_size, config.q_lora_rank, config.rms_norm_eps
        width = config.num_attention_heads * config.qk_head_dim
        self.heads = config.num_attention_heads
        self.down = None if rank is None else Linear(hidden, rank, form)
        self.norm = None if rank is None else RMSNorm(rank, eps, form.dtype)
        self.up = Linear(hidden if rank is None else rank, width, form)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] to [T, heads, nope + rope], not rotated yet."""
        if self.down is not None and self.norm is not None:
            x = self.norm(self.down(x))
        return self.up(x).unflatten(-1, (self.heads, -1))

    def slots(self, name: str) -> Iterator[Slot]:
        if self.down is None or self.norm is None:
            yield from self.up.slots(f"{name}.q_proj")
            return
        yield from self.down.slots(f"{name}.q_a_proj")
        yield from self.norm.slots(f"{name}.q_a_layernorm")
        yield from self.up.slots(f"{name}.q_b_proj")


class Expansion(nn.Module):
    """What makes each head's keys and values of a latent.

    Attributes:
        weight: [heads * (nope + v), latent]; the rows of all keys, then those of all values.
        key: the former as [heads, nope, latent].
        value: the latter as [heads, v, latent].
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        self.sizes = [self.heads * nope, self.heads * config.v_head_dim]
        self.weight = weight(sum(self.sizes), config.kv_lora_rank, dtype=dtype)

    @property
    def key(self) -> Tensor:
        return self.weight[: self.sizes[0]].unflatten(0, (self.heads, -1))

    @property
    def value(self) -> Tensor:
        return self.weight[self.sizes[0] :].unflatten(0, (self.heads, -1))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [m, heads, nope] and values [m, heads, v] of latents [m, latent]."""
        keys, values = ops.linear(latents, self.weight).split(self.sizes, dim=-1)
        return keys.unflatten(-1, (self.heads, -1)), values.unflatten(-1, (self.heads, -1))

    def absorb(self, query: Tensor) -> Tensor:
        """Queries [n, heads, nope] for keys as queries for latents, [n, heads, latent]."""
        return ops.linear_heads(query, self._absorbing)

    def release(self, mixed: Tensor) -> Tensor:
        """Mixtures of latents [n, heads, latent] as mixtures of values, [n, heads, v]."""
        return ops.linear_heads(mixed, self._releasing)

    def pack(self) -> None:
        """Brings the weight into the forms that the device computes with.

        Nothing can be loaded then.
        """
        whole = self.weight.detach()
        self._absorbing = ops.pack_heads(self.key.detach().transpose(1, 2))
        self._releasing = ops.pack_heads(self.value.detach())
        packed = ops.pack(whole)
        assert isinstance(packed, Tensor)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def slots(self, name: str) -> Iterator[Slot]:
        by_head = zip(self.key, self.value, strict=True)
        yield f"{name}.weight", Rows([part for head in by_head for part in head])


class Projections(nn.Module):
    """Hidden states to each head's query, and to the rows of the cache."""

    def __init__(self, config: ModelConfig, form: WeightFormat) -> None:
        super().__init__()
        self.nope, self.latent = config.qk_nope_head_dim, config.kv_lora_rank
        self.query = Query(config, form)
        self.kv_a = Linear(config.hidden_size, config.latent_dim, form)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps, form.dtype)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[T, hidden] to queries [T, heads, nope + rope] and rows [T, latent + rope]."""
        query = self.query(x)
        ops.rotate_(query[..., self.nope :], *rotation)
        rows = self.kv_a(x)
        rows[:, : self.latent] = self.kv_norm(rows[:, : self.latent])
        ops.rotate_(rows[:, None, self.latent :], *rotation)
        return query, rows

    def slots(self, name: str) -> Iterator[Slot]:
        yield from self.query.slots(name)
        yield from self.kv_a.slots(f"{name}.kv_a_proj_with_mqa")
        yield from self.kv_norm.slots(f"{name}.kv_a_layernorm")


class Attention(nn.Module):
    """One layer's attention over the rows of a step and the pages of their sequences."""

    def __init__(self, config: ModelConfig, form: WeightFormat) -> None:
        super().__init__()
        self.nope, self.latent = config.qk_nope_head_dim, config.kv_lora_rank
        self.heads, self.value_dim = config.num_attention_heads, config.v_head_dim
        self.scale = config.softmax_scale
        self.projections = Projections(config, form)
        self.expansion = Expansion(config, form.dtype)
        self.output = Linear(self.heads * self.value_dim, config.hidden_size, form)
        self.block = _EXPANDED_ELEMENTS // (self.heads * (config.qk_head_dim + self.value_dim))

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], context: StepContext, cache: Tensor
    ) -> Tensor:
        """[T, hidden] to [T, hidden]; writes the rows of the step to this layer's cache.

        Args:
            rotation: cosines and sines of the rows' positions, [T, rope / 2] fp32 each.
            cache: [pages, 64, latent + rope], or as bytes.
        """
        query, rows = self.projections(x, rotation)
        ops.write_rows(cache, context.slots, rows)
        if cache.dtype != rows.dtype:  # what is seen of a row is the same in every step
            rows = ops.read_rows(cache, context.slots, rows)
        out = x.new_empty(len(x), self.heads, self.value_dim)
        if (decode := context.decode) is not None:
            mixed = ops.attend_pages(
                self._absorbed(query if decode.rows is None else query[decode.rows]),
                cache,
                decode.pages,
                decode.lengths,
                self.latent,
                self.scale,
            )
            released = self.expansion.release(mixed)
            if decode.rows is None:
                out = released
            else:
                out[decode.rows] = released
        for chunk in context.chunks:
            out[chunk.rows] = self._attend(query[chunk.rows], rows[chunk.rows], chunk, cache)
        return self.output(out.flatten(1))

    def _absorbed(self, query: Tensor) -> Tensor:
        """[n, heads, nope + rope] to [n, heads, latent + rope]."""
        nope, rope = query.tensor_split([self.nope], dim=-1)
        return torch.cat((self.expansion.absorb(nope), rope), dim=-1)

    def _attend(self, query: Tensor, rows: Tensor, chunk: Chunk, cache: Tensor) -> Tensor:
        """A chunk's attention: over itself, then over its past in blocks of bounded size."""
        out, lse = self._over_expanded(query, rows, causal=True)
        if not len(chunk.past):
            return out
        attend = self._over_latents if chunk.absorbed else self._over_expanded
        asked = self._absorbed(query) if chunk.absorbed else query
        for slots in chunk.past.split(max(self.block, 1)):
            past = ops.read_rows(cache, slots, rows)
            out, lse = ops.merge(out, lse, *attend(asked, past))
        return out

    def _over_expanded(
        self, query: Tensor, rows: Tensor, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs [n, heads, v] and log-sum-exps [n, heads] over cache rows [m, latent + rope]."""
        keys, values = self.expansion(rows[:, : self.latent])
        return ops.attend(query, keys, rows[:, self.latent :], values, self.scale, causal)

    def _over_latents(self, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same for absorbed queries [n, heads, latent + rope]."""
        mixed, lse = ops.attend_latents(query, rows, self.latent, self.scale)
        return self.expansion.release(mixed), lse

    def slots(self, name: str) -> Iterator[Slot]:
        yield from self.projections.slots(name)
        yield from self.expansion.slots(f"{name}.kv_b_proj")
        yield from self.output.slots(f"{name}.o_proj")
