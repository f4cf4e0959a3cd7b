"""What the settings mean for one gang: its ranks' specs and its scheduler's limits."""

from model.config import ModelConfig
from serving.config import Settings
from serving.engine.pages import PAGE_TOKENS
from serving.engine.scheduler import EngineLimits
from serving.gang.messages import RankSpec
from serving.gang.repair import GangBounds


def pages_per_column(settings: Settings) -> int:
    """Cache pages of each column, the dummy page included."""
    return settings.gang.cache_tokens // PAGE_TOKENS + 1


def engine_limits(settings: Settings) -> EngineLimits:
    """The scheduler's limits; the longest request is what the model and a column can hold."""
    config = ModelConfig.from_directory(settings.model.directory)
    longest = min(config.max_position_embeddings, settings.gang.cache_tokens)
    if settings.model.max_model_len is not None:
        longest = min(longest, settings.model.max_model_len)
    return EngineLimits(
        stages=settings.gang.stages,
        columns=settings.gang.expert_parallel,
        pages_per_column=pages_per_column(settings),
        max_step_tokens=settings.engine.max_step_tokens,
        max_sequences=settings.engine.max_sequences,
        max_model_len=longest,
        prefix_cache=settings.engine.prefix_cache,
        vocab_size=config.vocab_size,
    )


def gang_bounds(settings: Settings) -> GangBounds:
    """How long the engine waits for its gang, and how often it repairs it."""
    gang = settings.gang
    return GangBounds(
        step_timeout_s=gang.step_timeout_s,
        gather_timeout_s=gang.gather_timeout_s,
        respawn_timeout_s=gang.respawn_timeout_s,
        repair_timeout_s=gang.repair_timeout_s,
        repairs_per_hour=settings.engine.repairs_per_hour,
    )


def rank_specs(settings: Settings, host: str, port: int, device: str) -> list[RankSpec]:
    """One spec per cell, stage by stage.

    Args:
        host: where the engine listens; ranks find out their own address by themselves.
        device: `cpu` or `cuda`.
    """
    gang = settings.gang
    return [
        RankSpec(
            stage=stage,
            rank=rank,
            stages=gang.stages,
            ranks=gang.expert_parallel,
            model_directory=str(settings.model.directory),
            dtype=settings.model.dtype,
            device=device,
            exchange=gang.exchange,
            pages=pages_per_column(settings),
            threads=gang.threads,
            engine_host=host,
            engine_port=port,
            host="",
            step_timeout_s=gang.step_timeout_s,
            start_timeout_s=gang.start_timeout_s,
            targets_directory=str(settings.telemetry.targets_directory),
            log_level=settings.telemetry.log_level,
            quantize=settings.model.quantize,
            fabric=gang.fabric,
        )
        for stage in range(gang.stages)
        for rank in range(gang.expert_parallel)
    ]
