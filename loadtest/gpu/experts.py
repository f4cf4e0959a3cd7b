"""The routed experts at the sizes of the real models: few rows, and a whole prompt.

python -m loadtest.gpu.experts        (tries other tiles for the products)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from loadtest.gpu.figure import EXPERTS_DECODE, EXPERTS_ERROR, EXPERTS_PREFILL, Figure
from loadtest.gpu.timing import median_seconds
from model import ops
from model.quantize import fp8_per_block

_BF16 = torch.bfloat16
_OPERATIONS = ("pack_experts", "weighted_experts")

# Tiles to try for both products: columns of the first one, depth, warps, stages; by rows.
_FEW_ROWS = tuple(product((32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5)))
_MANY_ROWS = tuple(product((64, 128), (32, 64), (4, 8), (2, 3, 4)))


@dataclass(frozen=True, slots=True)
class Layer:
    """The routed experts of one layer, all on one device."""

    experts: int
    hidden: int
    inner: int
    top_k: int = 6

    @property
    def numbers(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """gate_up and down, random and of a size that keeps products near 1."""
        gate_up = torch.empty(self.experts, 2 * self.inner, self.hidden, dtype=_BF16, device=device)
        down = torch.empty(self.experts, self.hidden, self.inner, dtype=_BF16, device=device)
        return gate_up.normal_(std=self.hidden**-0.5), down.normal_(std=self.inner**-0.5)

    def rows(self, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, and experts by chance, distinct for a row."""
        hidden = torch.randn(count, self.hidden, device=device).to(_BF16)
        chance = torch.rand(count, self.experts, device=device)
        weights, ids = chance.softmax(-1).topk(self.top_k)
        return hidden, ids, weights


LARGE, LITE = Layer(160, 5120, 1536), Layer(64, 2048, 1408)
TINY = Layer(4, 64, 32, top_k=2)


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Of the 236B model's layer, in bf16 and 8-bit floats; then of Lite's, for one stream."""
    layer = TINY if tiny else LARGE
    gate_up, down = layer.weights(device)
    packed = ops.pack_experts(gate_up, down)
    yield from _rates(layer, packed, 2, "", device, tiny)
    yield Figure(EXPERTS_ERROR, _error(layer, gate_up, down, device), "")
    ops.choose(device.type, "library", _OPERATIONS)
    packed = ops.pack_experts(gate_up, down)
    yield from _rates(layer, packed, 2, ", torch's grouped product", device, tiny)
    ops.choose(device.type, "auto", _OPERATIONS)
    del packed
    packed = ops.pack_experts(fp8_per_block(gate_up), fp8_per_block(down))
    del gate_up, down
    yield from _rates(layer, packed, 1, ", 8-bit floats", device, tiny)
    layer = TINY if tiny else LITE
    packed = ops.pack_experts(*layer.weights(device))
    seconds = _seconds(layer, packed, 1, device)
    yield Figure("experts, Lite layer, one stream, time", seconds * 1e6, "µs")


def _rates(
    layer: Layer, packed: ops.Experts, bytes_each: int, how: str, device: torch.device, tiny: bool
) -> Iterator[Figure]:
    """Bytes of weights that are read for few rows, and the products of many."""
    inputs = layer.rows(4 if tiny else 128, device)
    touched = inputs[1].unique().numel()
    seconds = _seconds_of(inputs, packed, device)
    read = touched * layer.numbers * bytes_each
    yield Figure(f"{EXPERTS_DECODE}{how}", read / seconds / 1e9, "GB/s")
    yield Figure(f"{EXPERTS_DECODE}{how}, time", seconds * 1e6, "µs")
    count = 16 if tiny else 8192
    seconds = _seconds(layer, packed, count, device)
    flop = 2 * layer.numbers * layer.top_k * count
    yield Figure(f"{EXPERTS_PREFILL}{how}", flop / seconds / 1e12, "TFLOP/s")


def _seconds(layer: Layer, packed: ops.Experts, count: int, device: torch.device) -> float:
    return _seconds_of(layer.rows(count, device), packed, device)


def _seconds_of(
    inputs: tuple[Tensor, Tensor, Tensor], packed: ops.Experts, device: torch.device
) -> float:
    return median_seconds(lambda: ops.weighted_experts(*inputs, packed, 0), device)


def _error(layer: Layer, gate_up: Tensor, down: Tensor, device: torch.device) -> float:
    """The largest error of a few rows, as a share of the largest magnitude."""
    hidden, ids, weights = layer.rows(4, device)
    packed = ops.pack_experts(gate_up, down)
    found = ops.weighted_experts(hidden, ids, weights, packed, 0).double()
    expected = torch.zeros_like(found)
    for row, (wishes, shares) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(wishes, shares, strict=True):
            gate, up = (gate_up[expert].double() @ hidden[row].double()).chunk(2)
            gated = torch.nn.functional.silu(gate) * up
            expected[row] += share * (down[expert].double() @ gated)
    return float((found - expected).abs().max() / expected.abs().max())


def sweep(device: torch.device) -> Iterator[tuple[int, object, float]]:
    """Numbers of rows with other tiles than the chosen ones, and their seconds; on GPUs alone."""
    from triton.runtime.errors import OutOfResources

    from model.ops.triton_experts import Tiles, with_tiles
    from model.ops.triton_linear import Tile

    packed = ops.pack_experts(*LARGE.weights(device))
    for count, rows, tiles in ((128, 16, _FEW_ROWS), (8192, 128, _MANY_ROWS)):
        hidden, ids, weights = LARGE.rows(count, device)
        for columns, depth, warps, stages in tiles:
            gated = Tile(rows, columns, depth, warps, stages)
            for down in (gated, gated._replace(columns=2 * columns)):
                pair = Tiles(gated, down)
                call = partial(with_tiles, pair, hidden, ids, weights, packed, 0)
                try:
                    yield count, pair, median_seconds(call, device)
                except OutOfResources as error:
                    print(f"{count} {pair}: {error}", flush=True)


def main() -> None:
    """The command."""
    for count, tiles, seconds in sweep(torch.device("cuda")):
        print(f"{count} rows {tiles}: {seconds * 1e6:.0f} µs", flush=True)


if __name__ == "__main__":
    main()
