"""Models to compare with: the bundled one and tiny random ones, as transformers runs them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from model.config import ModelConfig

NANO = Path(__file__).parents[2] / "model" / "nano" / "checkpoint"


@dataclass(frozen=True, eq=False)
class Oracle:
    """One model, as transformers holds it and as its checkpoint says."""

    reference: DeepseekV2ForCausalLM  # fp32
    config: ModelConfig
    tensors: dict[str, Tensor]

    def logits(self, tokens: list[int]) -> Tensor:
        """Of every position, [tokens, vocabulary] fp32."""
        with torch.inference_mode():
            return self.reference(torch.tensor([tokens])).logits[0]


TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "intermediate_size": 160,
    "moe_intermediate_size": 40,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2560,
}
# The features of the two published models: the 236B's and the Lite's.
FAMILIES: dict[str, dict[str, Any]] = {
    "like-236b": {
        "q_lora_rank": 56,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "mscale": 1.0,
    },
    "like-lite": {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "mscale": 0.707,
    },
}


def published_rope(mscale: float) -> dict[str, Any]:
    """YaRN as published, but trained on 64 positions, so that short texts go past them."""
    return {
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


def transformers_config(family: str) -> DeepseekV2Config:
    settings = TINY | FAMILIES[family]
    rope = published_rope(settings.pop("mscale")) | {"rope_type": "yarn", "rope_theta": 10000.0}
    return DeepseekV2Config(**settings, rope_parameters=rope)


@cache
def oracle(name: str) -> Oracle:
    """`nano`, or a random model of a family."""
    if name == "nano":
        reference = DeepseekV2ForCausalLM.from_pretrained(
            NANO, dtype=torch.float32, attn_implementation="eager"
        )
        return _oracle(reference, NANO)
    torch.manual_seed(0)
    reference = DeepseekV2ForCausalLM(transformers_config(name))
    reference.set_attn_implementation("eager")
    for parameter in reference.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    with TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        return _oracle(reference, Path(directory))


def _oracle(reference: DeepseekV2ForCausalLM, directory: Path) -> Oracle:
    tensors = load_file(directory / "model.safetensors")
    return Oracle(reference.eval(), ModelConfig.from_directory(directory), tensors)
