"""Where every part of a model lives: stages cut the layers, ranks share the experts."""

from dataclasses import dataclass
from functools import cached_property

from model.config import CheckpointError, ModelConfig


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """Coordinates of one rank: which pipeline stage, which share of the experts."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"{self.stage}.{self.rank}"


@dataclass(frozen=True)
class Layout:
    """A model cut into `stages` × `ranks` cells.

    Layers are contiguous per stage and balanced by bytes, not by count: the dense first layer,
    the embedding and the head weigh differently from an expert layer. Experts are contiguous
    per rank, so that a group of group-limited routing stays on as few ranks as can be.

    Raises:
        CheckpointError: more stages than layers, or experts not divisible by ranks.
    """

    config: ModelConfig
    stages: int
    ranks: int

    def __post_init__(self) -> None:
        layers, experts = self.config.num_hidden_layers, self.config.n_routed_experts
        if not 1 <= self.stages <= layers:
            raise CheckpointError(
                f"{self.stages} stages for {layers} layers; choose 1 to {layers} stages"
            )
        if self.ranks < 1 or experts % self.ranks:
            raise CheckpointError(
                f"{experts} experts cannot be shared by {self.ranks} ranks; "
                f"choose an expert-parallel size that divides {experts}"
            )

    @cached_property
    def cells(self) -> list[Cell]:
        return [Cell(stage, rank) for stage in range(self.stages) for rank in range(self.ranks)]

    def layers(self, stage: int) -> range:
        """The layers of a stage."""
        return range(self._bounds[stage], self._bounds[stage + 1])

    def experts(self, rank: int) -> range:
        """The routed experts, of every expert layer, that a rank holds."""
        share = self.config.n_routed_experts // self.ranks
        return range(rank * share, (rank + 1) * share)

    def has_embedding(self, stage: int) -> bool:
        return stage == 0

    def has_head(self, stage: int) -> bool:
        """Whether the stage ends in the final norm and the output projection."""
        return stage == self.stages - 1

    @cached_property
    def _bounds(self) -> list[int]:
        """First layer of each stage, then the number of layers: least heaviest stage wins.

        Dynamic programming over cut positions; `heaviest[n]` is the weight of the heaviest
        stage when the first n layers fill the stages considered so far.
        """
        weights = [layer_parameters(self.config, i) for i in range(self.config.num_hidden_layers)]
        ends = self.config.vocab_size * self.config.hidden_size
        weights[0] += ends
        weights[-1] += ends
        prefix = [0]
        for weight in weights:
            prefix.append(prefix[-1] + weight)
        count = len(weights)
        heaviest = [float(total) for total in prefix]
        cuts: list[list[int]] = []
        for stage in range(1, self.stages):
            best, cut = [float("inf")] * (count + 1), [0] * (count + 1)
            for end in range(stage + 1, count + 1):
                for start in range(stage, end):
                    peak = max(heaviest[start], prefix[end] - prefix[start])
                    if peak < best[end]:
                        best[end], cut[end] = peak, start
            heaviest = best
            cuts.append(cut)
        bounds = [count]
        for cut in reversed(cuts):
            bounds.append(cut[bounds[-1]])
        return [0, *reversed(bounds)]


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one layer's attention, its norms included."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    query = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        query_total = query * hidden
    else:
        query_total = config.q_lora_rank * (hidden + 1 + query)
    expansion = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return (
        query_total
        + config.latent_dim * hidden
        + config.kv_lora_rank * (1 + expansion)
        + heads * config.v_head_dim * hidden
    )


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def layer_parameters(config: ModelConfig, layer: int) -> int:
    """Parameters of one whole layer."""
    hidden = config.hidden_size
    common = attention_parameters(config) + 2 * hidden
    if config.is_dense(layer):
        return common + 3 * hidden * config.intermediate_size
    experts = (config.n_routed_experts + config.n_shared_experts) * expert_parameters(config)
    return common + experts + config.n_routed_experts * hidden
