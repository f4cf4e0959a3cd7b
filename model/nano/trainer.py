"""The nano model while it learns: forward, backward, update, and what a resumption needs."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

PEAK_RATE = 1.5e-3
LAST_RATE = 0.05  # of the peak
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.1
BALANCE = 0.01  # weight of the load-balance loss


class Trainer:
    """Model and optimizer, in float32; the forward pass computes in bfloat16."""

    def __init__(self, config: DeepseekV2Config, seed: int) -> None:
        torch.manual_seed(seed)
        config._experts_implementation = "grouped_mm"
        self.model = DeepseekV2ForCausalLM(config).float().train()
        self._named = dict(self.model.named_parameters())
        matrices = [p for p in self._named.values() if p.dim() >= 2]
        vectors = [p for p in self._named.values() if p.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._balance: list[Tensor] = []
        for module in self.model.modules():
            if isinstance(module, DeepseekV2TopkRouter):
                module.register_forward_hook(self._watch_balance)

    def step(self, rows: Tensor, rate: float) -> tuple[float, float]:
        """One update on `rows` [rows, 513]; its cross entropy and load-balance loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._balance.clear()
        entropy = self._loss(rows)
        balance = torch.stack(self._balance).mean()
        self._optimizer.zero_grad(set_to_none=True)
        (entropy + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return entropy.item(), balance.item()

    @torch.no_grad()
    def evaluate(self, rows: Tensor, count: int) -> float:
        """Mean loss in nats per token over `count` rows, spread evenly over `rows`."""
        self.model.eval()
        chosen = [i * len(rows) // count for i in range(count)]
        losses = [self._loss(rows[i : i + 1]).item() for i in chosen]
        self.model.train()
        return sum(losses) / count

    def tensors(self) -> dict[str, Tensor]:
        """All that a later `restore` needs, by name."""
        tensors = {f"model/{name}": p.detach() for name, p in self._named.items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(tensors[f"model/{name}"])
            self._optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def _loss(self, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def _watch_balance(self, module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        """Mean probability times share of tokens, by expert; 1.0 if all are used alike."""
        logits, _, chosen = output
        probability = logits.float().softmax(-1).mean(0)  # [experts]
        counts = torch.bincount(chosen.flatten(), minlength=module.num_experts)
        self._balance.append(module.num_experts * (counts / chosen.numel() * probability).sum())


def learning_rate(step: int, done: float) -> float:
    """Of the step after `step` others, with the share `done` of the run behind it."""
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)
