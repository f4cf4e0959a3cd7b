"""A checkpoint in 8-bit floats and a cache in 8-bit floats, served by engine and gang."""

import random
from pathlib import Path

import torch

from model.checkpoint import read_cell
from model.config import ModelConfig
from model.layout import Cell, Layout
from model.quantize import FP8
from model.quantized_checkpoint import write_quantized
from model.random_checkpoint import NANO, write_random
from model.sampling_params import SamplingParams
from serving.config import Settings
from serving.engine.request import Request
from serving.local_engine import local_engine
from tests.model.harness import Gang

GREEDY = SamplingParams(temperature=0.0)


def settings(tmp_path: Path, directory: Path, **gang: object) -> Settings:
    return Settings.model_validate(
        {
            "model": {"path": str(directory), "dtype": "float32"},
            "gang": {"cache_tokens": 2048, "start_timeout_s": 120, **gang},
            "telemetry": {"targets_directory": tmp_path / "targets", "log_level": "WARNING"},
        }
    )


def greedy(directory: Path, prompt: list[int], tokens: int) -> list[int]:
    """What the network says in one process."""
    config = ModelConfig.from_directory(directory)
    weights = dict(read_cell(directory, config, Layout(config, 1, 1), Cell(0, 0), torch.float32))
    gang = Gang(config, weights, cache_dtype=FP8)
    live = gang.open(prompt)
    count = len(prompt)
    for _ in range(tokens):
        logits = gang.advance({live: count})[live]
        live.tokens.append(int(logits.argmax()))
        count = 1
    return live.tokens[len(prompt) :]


async def test_a_quantized_checkpoint_serves_with_a_quantized_cache(tmp_path: Path) -> None:
    directory = tmp_path / "quantized"
    write_quantized(NANO, directory, "fp8-block", shard_bytes=4_000_000)
    numbers = random.Random(7)
    prompts = [[4091, *numbers.choices(range(4000), k=length)] for length in (5, 90)]
    wanted = settings(tmp_path, directory, stages=2, expert_parallel=2, cache_dtype="fp8")
    async with local_engine(wanted) as engine:
        requests = [Request(f"r{i}", prompt, 16, GREEDY) for i, prompt in enumerate(prompts)]
        completions = await engine.generate(requests)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == greedy(directory, prompt, 16)


async def test_ranks_make_random_weights_that_no_file_holds(tmp_path: Path) -> None:
    for name, weights in (("files", True), ("none", False)):
        write_random("nano", tmp_path / name, layers=2, seed=3, weights=weights)
    said = []
    for name in ("files", "none"):
        async with local_engine(settings(tmp_path, tmp_path / name)) as engine:
            (completion,) = await engine.generate([Request("r", [4091, 5, 6], 8, GREEDY)])
            said.append(completion.token_ids)
    assert said[0] == said[1]
    assert not list((tmp_path / "none").glob("*.safetensors"))
