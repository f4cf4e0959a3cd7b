"""What the memory of a rank's device holds: the largest step, measured, and pages for the rest."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from model.cache import DUMMY_PAGE, PAGE_TOKENS, LatentCache, bytes_per_page
from model.config import CheckpointError, ModelConfig
from model.context import Span, StepContext
from model.sampling import SamplingRow, sample
from model.sampling_params import SamplingParams
from model.stage import Stage
from serving.gang.exchange import StageExchange

_LEAST_PAGES = 3  # the dummy, and what the smallest setting asks for
_LONG_PAST = 8192  # tokens: more than attention expands at a time


class DeviceMemory(Protocol):
    """One device's memory, in bytes."""

    def total(self) -> int: ...

    def free(self) -> int:
        """What could still be allocated, after giving back what is only kept for later."""
        ...

    def available(self) -> int:
        """What is not in use, kept for later or not; tells at once."""
        ...

    def peak(self, call: Callable[[], None]) -> int:
        """The most that a call had allocated at once, beyond what was there before."""
        ...


class CudaMemory:
    """The current CUDA device's."""

    def total(self) -> int:
        return int(torch.cuda.mem_get_info()[1])

    def free(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def available(self) -> int:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept

    def peak(self, call: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What steps take beyond weights and cache: `least` bytes with one row, `most` with all."""

    least: int
    most: int
    rows: int  # of the largest step

    def needed(self, rows: int) -> int:
        """Bytes for so many rows; counted in powers of two, so that few sizes are asked for."""
        counted = min(1 << max(rows - 1, 0).bit_length(), self.rows)
        return self.least + max(self.most - self.least, 0) * counted // self.rows

    def reserve(self, rows: int, memory: DeviceMemory, device: torch.device) -> None:
        """Makes sure that there is what so many rows take; in one piece, where it is close.

        Raises:
            torch.OutOfMemoryError: there is not.
        """
        needed = self.needed(rows)
        if memory.available() < 2 * needed:
            torch.empty(needed, dtype=torch.uint8, device=device)


def measure_steps(
    config: ModelConfig,
    stage: Stage,
    exchange: StageExchange | None,
    memory: DeviceMemory,
    step_tokens: int,
    sequences: int,
) -> StepMemory:
    """Runs the smallest and the largest step of a loaded stage, without its peers.

    Args:
        step_tokens: rows of the largest step.
        sequences: how many of them want logits at most.
    """
    device = next(stage.parameters()).device
    cache = LatentCache(config, len(stage.layers), 1, stage.dtype, device)
    past = min(_LONG_PAST, config.max_position_embeddings - step_tokens)

    @torch.inference_mode()
    def run(rows: int) -> None:
        lone = min(sequences, rows) - 1  # decode rows; one chunk takes the others
        spans = [_span(0, 1)] * lone + [_span(max(past, 0), rows - lone)]
        context = StepContext.build(spans, device)
        if exchange is not None:
            exchange.begin([rows] * exchange.ranks)
        if stage.embedding is not None:
            inputs = torch.zeros(rows, dtype=torch.int64, device=device)
        else:
            inputs = torch.zeros(rows, config.hidden_size, dtype=stage.dtype, device=device)
        outputs = stage.forward(inputs, context, cache)
        if stage.head is not None:
            drawn = SamplingRow(SamplingParams(temperature=1.0, top_p=0.9), position=0)
            sample(outputs, [drawn] * len(outputs))

    with exchange.rehearsal() if exchange is not None else nullcontext():
        run(1)  # whatever is allocated once and for all
        least = memory.peak(lambda: run(1))
        most = memory.peak(lambda: run(step_tokens))
    return StepMemory(least, most, step_tokens)


def pages_that_fit(
    config: ModelConfig,
    layers: int,
    dtype: torch.dtype,
    memory: DeviceMemory,
    fraction: float,
    steps: StepMemory,
) -> int:
    """Cache pages, the dummy included, for what weights and the largest step leave.

    Args:
        fraction: of the whole memory, how much may be used.

    Raises:
        CheckpointError: nothing is left.
    """
    spare = memory.free() - round((1 - fraction) * memory.total()) - steps.most
    pages = spare // bytes_per_page(config, layers, dtype)
    if pages < _LEAST_PAGES:
        raise CheckpointError(
            f"the weights and a step of {steps.rows} tokens ({steps.most / 1e9:.1f} GB) leave no "
            f"memory for the cache; use more stages or ranks, a lower engine.max_step_tokens or a "
            f"higher gang.memory_fraction than {fraction:g}"
        )
    return pages


def _span(start: int, count: int) -> Span:
    """Positions whose rows are all on the dummy page: only their number matters."""
    pages = -(-(start + count) // PAGE_TOKENS)
    return Span(start, count, [DUMMY_PAGE] * pages, logits=1)
