"""transformers' own `generate` on the same shape, weights and prompts' lengths."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, GenerationConfig

from loadtest.gpu.figure import PEER_64, Figure
from loadtest.gpu.lite import FULL, TINY, Scale, config_of
from loadtest.gpu.timing import synchronize
from model.layout import Cell, Layout
from model.random_checkpoint import SHAPES, random_cell


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Greedy answers to the prompts that `lite` measures with its 64 streams."""
    scale = TINY if tiny else FULL
    model = peer(scale, device)
    # without an end-of-sequence token nothing stops early
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    numbers = torch.Generator().manual_seed(scale.peer_streams)
    shape = (scale.peer_streams, scale.peer_prompt)
    ids = torch.randint(model.config.vocab_size, shape, generator=numbers).to(device)
    answer = scale.answer // 2
    generate(model, ids, 2)
    synchronize(device)
    started = time.perf_counter()
    generated = generate(model, ids, answer)
    synchronize(device)
    seconds = time.perf_counter() - started
    assert generated.shape[1] == scale.peer_prompt + answer
    yield Figure(PEER_64, scale.peer_streams * answer / seconds, "tok/s")


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, answer: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    out: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=answer)
    return out


@torch.inference_mode()
def peer(scale: Scale, device: torch.device) -> Any:
    """Its model, with the weights that `lite` has."""
    raw = SHAPES[scale.shape] | {"num_hidden_layers": scale.layers}
    rope = raw["rope_scaling"] | {"rope_type": "yarn", "rope_theta": float(raw["rope_theta"])}
    unknown = ("rope_scaling", "rope_theta", "architectures", "model_type", "torch_dtype")
    settings = {key: value for key, value in raw.items() if key not in unknown}
    config = DeepseekV2Config(**settings, rope_parameters=rope)
    with device:
        model = DeepseekV2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    places = dict(model.named_parameters())
    ours = config_of(scale)
    for name, tensor in random_cell(ours, Layout(ours, 1, 1), Cell(0, 0), torch.bfloat16, device):
        _place(places, name).copy_(tensor)
    return model


def _place(places: dict[str, torch.nn.Parameter], name: str) -> torch.Tensor:
    """Where a tensor of a checkpoint belongs; transformers keeps a layer's experts in two."""
    if ".experts." not in name:
        return places[name]
    layer, _, rest = name.partition(".experts.")
    expert, which, _ = rest.split(".")
    if which == "down_proj":
        return places[f"{layer}.experts.down_proj"][int(expert)]
    halves = places[f"{layer}.experts.gate_up_proj"][int(expert)].chunk(2)
    return halves[0] if which == "gate_proj" else halves[1]
