"""Mixture of experts: who says something to a row, what they say, and what all say."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ops
from model.config import ModelConfig
from model.layers import MLP
from model.weights import Matrix, Rows, Slot, WeightFormat, weight


class LocalExperts(nn.Module):
    """Consecutive routed experts of one layer, those that one rank holds.

    Attributes:
        first: id of the first of them.
        gate_up: [experts, 2 * inner, hidden], the gate's rows before the up projection's.
        down: [experts, hidden, inner].

    Both take the tensors while they are loaded; `pack` makes of them what the device prefers.
    """

    def __init__(self, config: ModelConfig, held: range, form: WeightFormat) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self._held = held
        self._share = len(held) / config.n_routed_experts
        self.first = held.start
        self.gate_up = Matrix(2 * inner, hidden, form, parts=2, count=len(held))
        self.down = Matrix(hidden, inner, form, count=len(held))
        self._quantize = "int8" if form.quantize == "int8" else None
        self._packed: ops.Experts = None
        self._plain = False

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over those of each row's experts that live here.

        Args:
            hidden: [N, hidden]; N may be 0.
            ids: [N, k] int64 global expert ids; -1 and those held elsewhere cost nothing.
            weights: [N, k] fp32.

        Returns:
            [N, hidden] in hidden's dtype.
        """
        return self.by(ops.weighted_experts, hidden, ids, weights)

    def by(
        self,
        weighted_experts: Callable[..., Tensor],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """The same, computed by a given implementation."""
        return weighted_experts(hidden, ids, weights, self._packed, self.first)

    @property
    def plain(self) -> bool:
        """Whether the weights are in no fewer bits than what they are computed with."""
        return self._plain

    def pack(self) -> None:
        """Brings the weights into the device's favourite form; nothing can be loaded then."""
        both = self.gate_up.take(), self.down.take()
        self._plain = self._quantize is None and all(isinstance(each, Tensor) for each in both)
        self._packed = ops.pack_experts(*both, self._quantize, self._share)

    def slots(self, name: str) -> Iterator[Slot]:
        for index, expert in enumerate(self._held):
            yield f"{name}.{expert}.gate_proj.weight", self.gate_up.place(0, index)
            yield f"{name}.{expert}.up_proj.weight", self.gate_up.place(1, index)
            yield f"{name}.{expert}.down_proj.weight", self.down.place(0, index)


class ExpertExchange(Protocol):
    """How rows meet their experts when the ranks of a stage share the experts."""

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: LocalExperts
    ) -> Tensor:
        """The weighted sum over all routed experts of this rank's rows.

        Every rank of the stage calls it for the same layer, with its own rows.

        Args:
            hidden: [T, hidden].
            ids: [T, k] int64 global expert ids.
            weights: [T, k] fp32.
            experts: those that live on this rank.

        Returns:
            [T, hidden] in hidden's dtype.
        """
        ...


class LocalExchange(ExpertExchange):
    """The exchange of a rank that holds all experts: none."""

    def __call__(
        self, hidden: Tensor, ids: Tensor, weights: Tensor, experts: LocalExperts
    ) -> Tensor:
        return experts(hidden, ids, weights)


class Gate(nn.Module):
    """Chooses the routed experts of each row, in fp32: a bf16 gate flips near ties."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = weight(config.n_routed_experts, config.hidden_size, dtype=torch.float32)
        self.top_k = config.num_experts_per_tok
        self.groups = config.n_group
        self.groups_kept = config.topk_group
        self.scale = config.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, k] int64 and their weights [T, k] fp32 for rows [T, hidden]."""
        logits = F.linear(x.float(), self.weight)  # [T, experts]
        return ops.route(logits, self.top_k, self.groups, self.groups_kept, self.scale)

    def slots(self, name: str) -> Iterator[Slot]:
        yield f"{name}.weight", Rows([self.weight])


class MoE(nn.Module):
    """Shared experts, which every row sees, and the routed ones that its gate chooses."""

    def __init__(
        self,
        config: ModelConfig,
        held: range,
        form: WeightFormat,
        exchange: ExpertExchange,
    ) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = LocalExperts(config, held, form)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared, form) if shared else None
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.gate(x)
        out = self.exchange(x, ids, weights, self.experts)
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def slots(self, name: str) -> Iterator[Slot]:
        yield from self.gate.slots(f"{name}.gate")
        yield from self.experts.slots(f"{name}.experts")
        if self.shared_experts is not None:
            yield from self.shared_experts.slots(f"{name}.shared_experts")
