"""What the settings mean for one gang: its ranks' specs and its scheduler's limits."""

from model.config import ModelConfig
from serving.config import CPU_CACHE_TOKENS, Settings
from serving.engine.pages import PAGE_TOKENS
from serving.engine.scheduler import EngineLimits
from serving.gang.messages import RankSpec
from serving.gang.repair import GangBounds


def pages_per_column(settings: Settings, device: str = "cpu") -> int:
    """Cache pages of each column, the dummy page included; 0 if the ranks must find out."""
    tokens = settings.gang.cache_tokens
    if tokens == "auto":
        if device != "cpu":
            return 0
        tokens = CPU_CACHE_TOKENS
    return tokens // PAGE_TOKENS + 1


def engine_limits(settings: Settings, pages: int | None = None) -> EngineLimits:
    """The scheduler's limits; the longest request is what the model and a column can hold.

    Args:
        pages: of each column, as its ranks have them; by default as CPUs get them.
    """
    config = ModelConfig.from_directory(settings.model.directory)
    pages = pages or pages_per_column(settings)
    longest = min(_longest(settings, config), (pages - 1) * PAGE_TOKENS)
    return EngineLimits(
        stages=settings.gang.stages,
        columns=settings.gang.expert_parallel,
        pages_per_column=pages,
        max_step_tokens=settings.engine.max_step_tokens,
        max_sequences=settings.engine.max_sequences,
        max_model_len=longest,
        prefix_cache=settings.engine.prefix_cache,
        vocab_size=config.vocab_size,
    )


def _longest(settings: Settings, config: ModelConfig) -> int:
    """Tokens of the longest sequence that model and settings allow."""
    return min(config.max_position_embeddings, settings.model.max_model_len or 2**31)


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
    config = ModelConfig.from_directory(settings.model.directory)
    gpus = device != "cpu"
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
            pages=pages_per_column(settings, device),
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
            cache_dtype=gang.cache_dtype,
            measure=gpus,
            memory_fraction=gang.memory_fraction,
            step_tokens=settings.engine.max_step_tokens,
            sequences=settings.engine.max_sequences,
            longest=_longest(settings, config),
            graphs=gpus and gang.graphs == "auto",
            kernels=gang.kernels,
            compile=gang.compile == "on",
        )
        for stage in range(gang.stages)
        for rank in range(gang.expert_parallel)
    ]
