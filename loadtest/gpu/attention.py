"""Attention at the sizes of the real models: over pages of the cache, and of a chunk.

python -m loadtest.gpu.attention        (tries other tiles for the kernels over pages)
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loadtest.gpu.figure import ATTEND_16, ATTEND_128, ATTEND_ERROR, Figure
from loadtest.gpu.timing import median_seconds
from model import ops
from model.cache import PAGE_TOKENS
from model.ops.contest import unfit
from model.quantize import fp8_row_bytes

_BF16 = torch.bfloat16
_VALUE, _ROPE, _SCALE = 512, 64, 0.1147

# Tiles to try: heads, tokens, warps, stages, and programs that a multiprocessor then runs.
_FEW_HEADS = (
    (16, 32, 4, 2, 3),
    (16, 32, 4, 3, 2),
    (16, 32, 4, 4, 1),
    (16, 32, 8, 3, 2),
    (16, 64, 4, 2, 2),
    (16, 64, 8, 2, 2),
    (16, 64, 8, 3, 1),
    (16, 16, 4, 4, 3),
)
_MANY_HEADS = (
    (64, 64, 8, 2, 1),
    (64, 32, 8, 3, 1),
    (64, 32, 8, 2, 1),
    (32, 64, 8, 2, 1),
    (32, 32, 4, 3, 1),
    (128, 32, 8, 2, 1),
)


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode of `batch` sequences of `context` tokens each, over pages in disorder."""

    heads: int
    batch: int
    context: int
    fp8: bool = False

    @property
    def flop(self) -> int:
        return 2 * (2 * _VALUE + _ROPE) * self.heads * self.batch * self.context

    @property
    def read(self) -> int:
        """Bytes of the cache."""
        row = fp8_row_bytes(_VALUE, _ROPE) if self.fp8 else 2 * (_VALUE + _ROPE)
        return row * self.batch * self.context

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, one layer's cache, page tables and lengths."""
        per_sequence = -(-self.context // PAGE_TOKENS)
        pages = torch.randperm(self.batch * per_sequence, device=device) + 1
        plain = torch.zeros(
            len(pages) + 1, PAGE_TOKENS, _VALUE + _ROPE, dtype=_BF16, device=device
        ).normal_()
        query = torch.randn(self.batch, self.heads, _VALUE + _ROPE, device=device).to(_BF16)
        lengths = torch.full((self.batch,), self.context, device=device)
        cache = _in_8_bits(plain) if self.fp8 else plain
        return query, cache, pages.view(self.batch, per_sequence), lengths


def _in_8_bits(plain: Tensor) -> Tensor:
    cache = plain.new_empty(*plain.shape[:2], fp8_row_bytes(_VALUE, _ROPE), dtype=torch.uint8)
    ops.write_rows(cache, torch.arange(plain[..., 0].numel(), device=plain.device),
                   plain.flatten(0, 1))  # fmt: skip
    return cache


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Rates over pages and their error, then rates of chunks."""
    batch, context = (2, 100) if tiny else (64, 8192)
    for name, heads in ((ATTEND_128, 128), (ATTEND_16, 16)):
        yield from _decode(name, Decode(heads, batch, context), device)
        yield from _decode(f"{name}, fp8 cache", Decode(heads, batch, context, fp8=True), device)
    yield Figure(ATTEND_ERROR, _error(Decode(16, 2, context), device), "")
    yield from _single(Decode(16, 1, 100 if tiny else 1024), device)
    for heads, tokens in ((16, 64 if tiny else 8192), (128, 32 if tiny else 4096)):
        yield _chunk(heads, tokens, "", device)
    if device.type == "cuda":
        yield from _by_libraries(device)


def _by_libraries(device: torch.device) -> Iterator[Figure]:
    """The same by kernels that are not ours; figures of those that are not there are left out."""
    ops.choose(device.type, "library", ["attend"])
    yield _chunk(16, 8192, ", torch's flash attention", device)
    ops.choose(device.type, "auto", ["attend"])
    decode = ["plan_pages", "attend_pages"]
    for kind, name in (("flash_mla", "FlashMLA"), ("flashinfer", "FlashInfer")):
        if unfit(kind, device) is None:
            ops.choose(device.type, kind, decode)
            yield from _decode(f"{ATTEND_128}, {name}", Decode(128, 64, 8192), device)
            yield from _decode(f"{ATTEND_16}, {name}", Decode(16, 64, 8192), device)
            ops.choose(device.type, "auto", decode)


def _decode(name: str, case: Decode, device: torch.device) -> Iterator[Figure]:
    """With 128 heads the figure that counts is FLOP, with 16 it is bytes; the other stands by."""
    seconds = _seconds(case, device)
    rates = (
        Figure(name, case.flop / seconds / 1e12, "TFLOP/s"),
        Figure(name, case.read / seconds / 1e9, "GB/s"),
    )
    first, second = rates if case.heads > 64 else reversed(rates)
    yield first
    yield replace(second, name=f"{name}, {'read' if second.unit == 'GB/s' else 'computed'}")
    yield Figure(f"{name}, time", seconds * 1e6, "µs")


def _single(case: Decode, device: torch.device) -> Iterator[Figure]:
    """One sequence: how well few programs' worth of work spread over the device."""
    name = f"MLA decode, {case.heads} heads, one stream, 1K context, time"
    yield Figure(name, _seconds(case, device) * 1e6, "µs")


def _seconds(case: Decode, device: torch.device) -> float:
    inputs = case.inputs(device)
    return median_seconds(lambda: ops.attend_pages(*inputs, _VALUE, _SCALE), device)


def _error(case: Decode, device: torch.device) -> float:
    """The largest error, as a share of the largest magnitude."""
    query, cache, pages, lengths = case.inputs(device)
    found = ops.attend_pages(query, cache, pages, lengths, _VALUE, _SCALE).double()
    expected = _in_fp64(query, cache, pages, lengths)
    return float((found - expected).abs().max() / expected.abs().max())


def _in_fp64(query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    rows = cache[pages].flatten(1, 2).double()  # [B, tokens, latent]
    rows = rows[:, : int(lengths[0])]
    scores = torch.einsum("bhd,bmd->bhm", query.double(), rows) * _SCALE
    return torch.einsum("bhm,bmv->bhv", scores.softmax(-1), rows[..., :_VALUE])


def _chunk(heads: int, tokens: int, how: str, device: torch.device) -> Figure:
    """Causal attention of a whole prompt, expanded; half of all scores count."""
    query = torch.randn(tokens, heads, 192, device=device).to(_BF16)
    both = torch.randn(tokens, heads * 256, device=device).to(_BF16)
    key, value = (part.unflatten(-1, (heads, 128)) for part in both.chunk(2, dim=-1))
    shared = torch.randn(tokens, _ROPE, device=device).to(_BF16)
    seconds = median_seconds(lambda: ops.attend(query, key, shared, value, _SCALE, True), device)
    flop = (192 + 128) * heads * tokens * (tokens + 1)
    name = f"prefill attention, {heads} heads, {tokens} tokens{how}"
    return Figure(name, flop / seconds / 1e12, "TFLOP/s")


def sweep(device: torch.device) -> Iterator[tuple[Decode, object, float]]:
    """Cases with other tiles than the chosen ones, and their seconds; on GPUs alone."""
    from triton.runtime.errors import OutOfResources

    from model.ops.triton_cache import parts_of
    from model.ops.triton_latents import Tiles, attend_parts

    for heads, tiles in ((16, _FEW_HEADS), (128, _MANY_HEADS)):
        for fp8 in (False, True):
            case = Decode(heads, 64, 8192, fp8)
            query, cache, pages, lengths = case.inputs(device)
            attend = partial(
                attend_parts, query, parts_of(cache, _VALUE), _VALUE, _SCALE, pages, lengths
            )
            for tile in itertools.starmap(Tiles, tiles):
                try:
                    yield case, tile, median_seconds(partial(attend, tile=tile), device)
                except OutOfResources as error:
                    print(f"{case} {tile}: {error}", flush=True)


def main() -> None:
    """The command."""
    for case, tile, seconds in sweep(torch.device("cuda")):
        rates = f"{case.read / seconds / 1e9:.0f} GB/s {case.flop / seconds / 1e12:.0f} TFLOP/s"
        print(f"{case} {tile}: {seconds * 1e6:.0f} µs {rates}", flush=True)


if __name__ == "__main__":
    main()
