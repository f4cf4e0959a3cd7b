"""Every setting of the serving stack, in one tree; nothing is configured anywhere else.

The same tree is read from `expertline up --config FILE`, from the `args` of a Serve
application and from the CLI's flags. Unknown keys are refused.
"""

from os import getuid
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from model.config import ModelConfig

NANO = "nano"
CPU_CACHE_TOKENS = 32768
EXPERTS_OF_THE_236B = 160
NANO_DIRECTORY = Path(__file__).resolve().parent.parent / "model" / "nano" / "checkpoint"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(_Settings):
    """Which checkpoint is served, and under which name."""

    path: str = Field(NANO, description="a checkpoint's folder, or `nano` for the bundled one")
    name: str | None = Field(None, description="model id that clients use; default: folder's name")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="what is computed in, and stored unless another setting says less"
    )
    quantize: Literal["int8", "fp8", "fp8_tensor"] | None = Field(
        None,
        description="at load. int8: routed experts in 8 bits, on CPUs, half the memory of "
        "bfloat16. fp8: all matrices in 8-bit floats with a scale for each block of 128 x 128; "
        "fp8_tensor: with one for each matrix. On CPUs such matrices are widened again",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="prompt + output tokens; default: what the cache can hold"
    )
    fill_in_the_middle: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether completions take a `suffix`; auto: not on the 236B, which was not "
        "trained for it",
    )

    def fills_in_the_middle(self, config: ModelConfig) -> bool:
        """Whether `suffix` is allowed on a model of this shape."""
        if self.fill_in_the_middle == "auto":
            return config.n_routed_experts != EXPERTS_OF_THE_236B
        return self.fill_in_the_middle == "on"

    @property
    def directory(self) -> Path:
        return NANO_DIRECTORY if self.path == NANO else Path(self.path).expanduser().resolve()

    @property
    def served_name(self) -> str:
        return self.name or (NANO if self.path == NANO else self.directory.name)


class GangSettings(_Settings):
    """How one replica of the model is cut, and what a rank gets."""

    stages: int = Field(1, ge=1, le=64, description="pipeline stages")
    expert_parallel: int = Field(1, ge=1, le=256, description="ranks per stage")
    exchange: Literal["gather", "all_to_all"] = Field(
        "gather", description="how tokens meet their experts inside a stage"
    )
    fabric: Literal["auto", "shared_memory", "gloo"] = Field(
        "auto",
        description="how tensors move among CPU ranks; auto: through shared memory in a group "
        "whose ranks are all on one host, else by gloo",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is one")
    threads: int = Field(1, ge=1, description="CPU threads of a rank")
    cpus: float = Field(0.1, gt=0, description="CPUs that Ray reserves for a rank")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    cache_tokens: Annotated[int, Field(ge=128)] | Literal["auto"] = Field(
        "auto",
        description="latent cache of each column of ranks, in tokens; auto: on GPUs what weights "
        "and the largest step leave of their memory, which is measured; on CPUs 32768",
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="how much of a GPU's memory may be used"
    )
    graphs: Literal["auto", "off"] = Field(
        "auto",
        description="decode steps from CUDA graphs; auto: on GPUs, unless the exchange is "
        "all_to_all, whose shapes depend on the routing",
    )
    cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="auto: as the model; fp8: latents in 8-bit floats, 656 bytes a token and layer "
        "instead of 1,152, for twice the tokens nearly",
    )
    kernels: Literal["auto", "reference", "triton", "library", "flash_mla", "flashinfer"] = Field(
        "auto",
        description="what computes: auto: what is the fastest; on GPUs our own kernels, unless a "
        "library that is there turns out to be faster when the rank starts; reference: plain "
        "torch; triton: our own kernels, an error where they cannot run; library: these, but for "
        "torch's grouped products for the experts, torch's flash attention for prompts and, if it "
        "is installed, FlashMLA for decode; flash_mla, flashinfer: our own, but for decode by that "
        "package, an error without it",
    )
    compile: Literal["off", "on"] = Field(
        "off",
        description="on: torch.compile for what is dense: projections, norms and feed-forwards, in "
        "bf16 or fp32. Starting takes longer. What cannot be compiled is logged with the reason, "
        "and computed as with off",
    )
    start_timeout_s: float = Field(3600.0, gt=0, description="from launch to weights loaded")
    step_timeout_s: float = Field(
        60.0, gt=0, description="longest step before the gang counts as broken and is repaired"
    )
    gather_timeout_s: float = Field(
        10.0,
        gt=0,
        description="in a repair: how long a rank that lives may take to answer before it is "
        "replaced as well",
    )
    respawn_timeout_s: float = Field(
        120.0,
        gt=0,
        description="in a repair: from the launch of a new rank until it connects, the wait for "
        "a node included; past it the whole replica starts anew",
    )
    repair_timeout_s: float = Field(
        600.0, gt=0, description="longest repair, the new rank's loading included; as above"
    )


class EngineSettings(_Settings):
    """One replica's scheduler."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(0.1, gt=0, description="CPUs that Ray reserves for the engine itself")
    max_step_tokens: int = Field(512, ge=64, description="token budget of a step, per column")
    max_sequences: int = Field(256, ge=1, description="running sequences, per column")
    prefix_cache: bool = True
    drain_timeout_s: float = Field(
        60.0,
        ge=0,
        description="what running requests get to finish on an engine that leaves, before they "
        "are moved to another one",
    )
    update_surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="replicas that an update may start before it stops old ones, in percent; "
        "each needs GPUs beside theirs",
    )
    repairs_per_hour: int = Field(
        6, ge=0, description="repairs of its gang; one more, and the whole replica starts anew"
    )
    move_after_s: float = Field(
        2.0,
        ge=0,
        description="requests of an engine that is under repair for so long go on with another "
        "one, if one serves",
    )


class RouterSettings(_Settings):
    """Admission and the fair queue."""

    queue_limit: int = Field(1024, ge=0, description="waiting requests before a 429")
    queue_timeout_s: float = Field(60.0, gt=0, description="longest wait before a 503")
    expected_output_tokens: int = Field(
        512, ge=1, description="what is reserved at most for an answer of unknown length"
    )
    prefix_entries: int = Field(100_000, ge=0, description="pages the prefix index remembers")
    silence_s: float = Field(
        3.0,
        ge=1.0,
        description="a process of the fleet that says nothing for so long gets nothing new, and "
        "what it has goes on elsewhere if it can",
    )


class IngressSettings(_Settings):
    """The HTTP surface."""

    host: str = Field("127.0.0.1", description="address that clients connect to")
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = Field(1, ge=1, description="fixed: scaling it would cut streams")
    longest_stream_s: float = Field(
        3600.0, ge=60, description="what an ingress that is replaced gets to finish its streams"
    )
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    max_choices: int = Field(16, ge=1, le=128, description="`n` × prompts of one request")
    max_logprobs: int = Field(20, ge=0)
    resume_attempts: int = Field(
        5,
        ge=0,
        description="engines that may be lost or may refuse a generation, one after another "
        "without a token from any of them, before it fails",
    )
    resume_timeout_s: float = Field(
        120.0, gt=0, description="longest pause of a generation whose engine was lost"
    )
    keep_alive_s: float = Field(
        5.0, gt=0, description="a stream that says nothing for so long sends a comment"
    )
    max_unread_tokens: int = Field(
        8192, ge=64, description="of a generation whose client does not read, before it is ended"
    )
    stored_responses: int = Field(
        0, ge=0, description="answers of /v1/responses that are kept; 0: storing is off"
    )
    stored_bytes: int = Field(256 * 1024 * 1024, ge=0, description="their size at most")
    stored_s: float = Field(24 * 3600.0, gt=0, description="how long one is kept at most")
    api_keys_file: Path | None = Field(
        None, description="one `name:key` per line; without it the server is open"
    )


class TelemetrySettings(_Settings):
    """Metrics and logs."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    targets_directory: Path = Field(
        default_factory=lambda: Path(gettempdir()) / f"expertline-{getuid()}" / "targets",
        description="Prometheus file_sd folder: one file for each process of this machine",
    )


class Settings(_Settings):
    """The whole tree."""

    model: ModelSettings = ModelSettings()
    gang: GangSettings = GangSettings()
    engine: EngineSettings = EngineSettings()
    router: RouterSettings = RouterSettings()
    ingress: IngressSettings = IngressSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    internal_host: str | None = Field(
        None, description="address of the internal ports; default: the node's, as Ray knows it"
    )
    secret: SecretStr | None = Field(
        None, description="shared secret of the internal ports; default: a fresh random one"
    )
