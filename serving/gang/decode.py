"""The graphs of one rank's decode steps, made from what the rank has."""

from collections.abc import Sequence

import torch

from model.cache import PAGE_TOKENS, LatentCache
from model.config import ModelConfig
from model.graphs import Capture, CudaCapture, DecodeGraphs, Rows
from model.stage import Stage
from serving.gang.exchange import StageExchange


def decode_graphs(
    config: ModelConfig,
    stage: Stage,
    cache: LatentCache,
    exchange: StageExchange | None,
    buckets: Sequence[int],
    longest: int,
    capture: Capture | None = None,
) -> DecodeGraphs | None:
    """A rank's graphs, to be recorded; every rank of a stage does that together.

    Args:
        buckets: rows of the graphs, in ascending order.
        longest: tokens of the longest sequence.
        capture: how; by default as CUDA graphs.

    Returns:
        None if the exchange's shapes depend on the routing, so that nothing can be recorded.
    """
    if exchange is not None and not exchange.static:
        return None

    def begin(bucket: int) -> None:
        if exchange is not None:
            exchange.begin([bucket] * exchange.ranks)

    hidden = Rows(config.hidden_size, stage.dtype)
    logits = Rows(config.vocab_size, torch.float32)
    return DecodeGraphs(
        lambda inputs, context: stage.forward(inputs, context, cache),
        inputs=hidden if stage.embedding is None else None,
        outputs=hidden if stage.head is None else logits,
        selects=stage.head is not None,
        buckets=buckets,
        longest=-(-longest // PAGE_TOKENS),
        device=cache.rows.device,
        capture=capture or CudaCapture(),
        begin=begin,
    )
