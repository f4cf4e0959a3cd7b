"""What a DeepSeek-V2 checkpoint says of itself: config.json, read once and checked.

Both spellings are read: `rope_scaling` + `rope_theta` as the published checkpoints have it, and
`rope_parameters` as transformers 5 writes it. Names follow the file's own keys.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANDOM_SEED = "expertline_random_seed"  # our own key of config.json


class CheckpointError(Exception):
    """A directory that cannot be served as a DeepSeek-V2 model; one line, says what to do."""


def json_object(path: Path) -> dict[str, Any]:
    """What a checkpoint's JSON file says.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return raw


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding, with YaRN when `factor` is over 1 (arXiv 2309.00071, section 3)."""

    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def _mscale(self, weight: float) -> float:
        if self.factor <= 1.0 or weight == 0.0:
            return 1.0
        return 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def cos_sin_multiplier(self) -> float:
        """What cos and sin are multiplied by: 1.0 on both published models."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    @property
    def softmax_multiplier(self) -> float:
        """What the softmax scale is multiplied by; 1.874 on the 236B, 1.590 on the Lite."""
        return self._mscale(self.mscale_all_dim) ** 2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of one DeepSeek-V2 model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # None: one plain q_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int  # 1: greedy top-k over all experts
    topk_group: int
    routed_scaling_factor: float
    first_k_dense_replace: int
    moe_layer_freq: int
    rms_norm_eps: float
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    rope: RopeConfig
    quantization: str | None = None  # method by which matrices came to be 8-bit floats
    random_seed: int | None = None  # of weights that are made where they are used, not read

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements of one cached row: normed latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.qk_head_dim**-0.5 * self.rope.softmax_multiplier

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace or layer % self.moe_layer_freq != 0

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Reads `directory/config.json`.

        Raises:
            CheckpointError: no such file, not JSON, another architecture, or a setting that
                this implementation does not compute.
        """
        path = directory / "config.json"
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory; give a checkpoint's folder")
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: no config.json; give a checkpoint in the Hugging Face layout"
            )
        return cls.from_dict(json_object(path), source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config") -> "ModelConfig":
        """The same from a parsed config.json; `source` names it in errors."""
        _refuse_unsupported(raw, source)
        grouped = raw.get("topk_method", "greedy") == "group_limited_greedy"
        try:
            config = cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=raw["num_attention_heads"],
                q_lora_rank=raw["q_lora_rank"],
                kv_lora_rank=raw["kv_lora_rank"],
                qk_nope_head_dim=raw["qk_nope_head_dim"],
                qk_rope_head_dim=raw["qk_rope_head_dim"],
                v_head_dim=raw["v_head_dim"],
                intermediate_size=raw["intermediate_size"],
                moe_intermediate_size=raw["moe_intermediate_size"],
                n_routed_experts=raw["n_routed_experts"],
                n_shared_experts=raw["n_shared_experts"],
                num_experts_per_tok=raw["num_experts_per_tok"],
                n_group=raw["n_group"] if grouped else 1,
                topk_group=raw["topk_group"] if grouped else 1,
                routed_scaling_factor=float(raw["routed_scaling_factor"]),
                first_k_dense_replace=raw["first_k_dense_replace"],
                moe_layer_freq=raw.get("moe_layer_freq", 1),
                rms_norm_eps=raw["rms_norm_eps"],
                max_position_embeddings=raw["max_position_embeddings"],
                bos_token_id=raw["bos_token_id"],
                eos_token_id=raw["eos_token_id"],
                rope=_rope(raw),
                quantization=_quantization(raw, source),
                random_seed=_random_seed(raw, source),
            )
        except KeyError as error:
            raise CheckpointError(f"{source}: {error.args[0]} is missing") from error
        _check(config, source)
        return config


def _refuse_unsupported(raw: dict[str, Any], source: str) -> None:
    """Settings that change the mathematics and that no published DeepSeek-V2 uses."""
    model_type = raw.get("model_type")
    if model_type != "deepseek_v2":
        raise CheckpointError(
            f"{source}: model_type is {model_type!r}; Expertline serves deepseek_v2 only"
        )
    required = {
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (False,),
        "topk_method": ("greedy", "group_limited_greedy"),
    }
    for key, allowed in required.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{source}: {key}={raw[key]!r} is not supported, only {allowed}")


def _rope(raw: dict[str, Any]) -> RopeConfig:
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise CheckpointError(f"rope type {kind!r} is not supported, only 'yarn' and 'default'")
    return RopeConfig(
        theta=theta,
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(
            scaling.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        ),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 1.0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
    )


def _quantization(raw: dict[str, Any], source: str) -> str | None:
    """The method, once it is sure that what it made are e4m3 floats with scales that we know.

    Which tensors it made, the shards themselves say best.
    """
    said = raw.get("quantization_config") or raw.get("compression_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    try:
        if method == "fp8":
            kinds: list[tuple[object, object]] = [("e4m3", said.get("fmt", "e4m3"))]
            kinds += [([128, 128], said.get("weight_block_size") or [128, 128])]
        elif method == "compressed-tensors":
            weights = [group["weights"] for group in said["config_groups"].values()]
            kinds = [((8, "float"), (each["num_bits"], each["type"])) for each in weights]
            kinds += [([128, 128], each.get("block_structure") or [128, 128]) for each in weights]
        else:
            kinds = [("fp8 or compressed-tensors", method)]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: quantization_config lacks {error}") from error
    for known, found in kinds:
        if found != known:
            raise CheckpointError(
                f"{source}: quantized weights of the kind {found} are not supported, "
                f"only {known}, which are 8-bit floats; give the bfloat16 checkpoint"
            )
    return method


def _random_seed(raw: dict[str, Any], source: str) -> int | None:
    seed = raw.get(RANDOM_SEED)
    if seed is not None and not isinstance(seed, int):
        raise CheckpointError(f"{source}: {RANDOM_SEED} must be a whole number")
    return seed


def _check(config: ModelConfig, source: str) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts"):
        if getattr(config, name) < 1:
            raise CheckpointError(f"{source}: {name} must be at least 1")
    if config.n_routed_experts % config.n_group:
        raise CheckpointError(f"{source}: n_group does not divide n_routed_experts")
    candidates = config.n_routed_experts // config.n_group * config.topk_group
    if config.num_experts_per_tok > candidates:
        raise CheckpointError(f"{source}: num_experts_per_tok exceeds the {candidates} eligible")
