"""The network against transformers' own DeepseekV2ForCausalLM, in fp32."""

import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from model.cache import PAGE_TOKENS, LatentCache
from model.config import ModelConfig
from model.context import EXPANDED_QUERIES, Span, StepContext
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.stage import Stage
from tests.model.harness import CPU, Gang, Live, load, relative_error
from tests.model.oracle import FAMILIES, NANO, Oracle, oracle, published_rope, transformers_config

MODELS = ["nano", *FAMILIES]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)]
TOLERANCE = 1e-4

# How many tokens of a sequence each step computes.
SCHEDULES: dict[str, list[int]] = {
    "whole": [260],
    "one_by_one": [1] * 70,
    "prompt_then_decode": [130, *[1] * 8],
    "across_page_edges": [33, 31, 64, 63, 2, 60],
    "both_sides_of_the_absorbed_rule": [40, EXPANDED_QUERIES - 1, EXPANDED_QUERIES, 7, 1],
}


def random_tokens(model: Oracle, count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(model.config.vocab_size), k=count)


def check_schedules(model: Oracle, gang: Gang, schedules: dict[str, list[int]]) -> None:
    """Runs all schedules side by side; the logits of every step must be transformers'."""
    lives: dict[str, Live] = {}
    for index, (name, schedule) in enumerate(schedules.items()):
        tokens = random_tokens(model, sum(schedule), seed=index)
        lives[name] = gang.open(tokens, column=index % gang.layout.ranks)
    expected = {name: model.logits(live.tokens) for name, live in lives.items()}
    for step in range(max(map(len, schedules.values()))):
        counts = {
            live: schedules[name][step]
            for name, live in lives.items()
            if step < len(schedules[name])
        }
        logits = gang.advance(counts)
        for name, live in lives.items():
            if live in counts:
                error = relative_error(logits[live], expected[name][live.computed - 1])
                assert error < TOLERANCE, f"{name}, step {step}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, schedule: str) -> None:
    model = oracle(name)
    check_schedules(model, Gang(model.config, model.tensors), {schedule: SCHEDULES[schedule]})


@pytest.mark.parametrize(("stages", "ranks"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_computes_mixed_batches_alike(name: str, stages: int, ranks: int) -> None:
    model = oracle(name)
    check_schedules(model, Gang(model.config, model.tensors, stages, ranks), SCHEDULES)


@pytest.mark.parametrize("name", MODELS)
def test_a_past_in_several_blocks_computes_alike(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oracle(name)
    monkeypatch.setattr("model.attention._EXPANDED_ELEMENTS", 2**14)
    monkeypatch.setattr("model.ops.cpu._GATHERED_TOKENS", 1)
    schedules = {name: SCHEDULES[name] for name in SCHEDULES if name != "one_by_one"}
    check_schedules(model, Gang(model.config, model.tensors), schedules)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_can_share_the_pages_of_a_prefix(name: str) -> None:
    model = oracle(name)
    gang = Gang(model.config, model.tensors)
    prefix = random_tokens(model, 2 * PAGE_TOKENS)
    first = gang.open(prefix + random_tokens(model, 30, seed=1))
    gang.advance({first: 140})
    second = gang.open(prefix + random_tokens(model, 25, seed=2), pages=first.pages[:2])
    together = gang.advance({first: 18, second: 25})
    for live in (first, second):
        assert relative_error(together[live], model.logits(live.tokens)[-1]) < TOLERANCE


def test_a_rank_without_sequences_takes_part() -> None:
    model = oracle("nano")
    gang = Gang(model.config, model.tensors, stages=2, ranks=2)
    live = gang.open(random_tokens(model, 12), column=1)
    expected = model.logits(live.tokens)
    for count in (10, 1, 1):
        logits = gang.advance({live: count})[live]
        assert relative_error(logits, expected[live.computed - 1]) < TOLERANCE


def test_decoding_alone_equals_decoding_in_a_batch_of_32() -> None:
    model = oracle("nano")
    prompts = [random_tokens(model, 3 + 4 * i, seed=i) for i in range(32)]
    crowd = Gang(model.config, model.tensors)
    alone = Gang(model.config, model.tensors)
    lives = [(crowd.open(prompt), alone.open(prompt)) for prompt in prompts]
    counts = {together: len(together.tokens) for together, _ in lives}
    for _ in range(4):
        logits = crowd.advance(counts)
        for together, single in lives:
            row = alone.advance({single: counts[together]})[single]
            assert relative_error(logits[together], row) < 1e-5
            assert row.argmax() == logits[together].argmax()
            together.tokens.append(int(row.argmax()))
            single.tokens.append(int(row.argmax()))
        counts = dict.fromkeys(counts, 1)


def test_bfloat16_mostly_chooses_the_same_tokens() -> None:
    model = oracle("nano")
    source = (NANO.parents[1] / "config.py").read_text(encoding="utf-8")
    tokens = Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(source).ids[:300]
    stage = Stage(
        model.config, Layout(model.config, 1, 1), Cell(0, 0), torch.bfloat16, CPU, LocalExchange()
    )
    load(stage, model.tensors)
    cache = LatentCache(model.config, len(stage.layers), 6, torch.bfloat16, CPU)
    context = StepContext.build([Span(0, len(tokens), range(1, 6))], CPU)
    context = replace(context, logit_rows=context.positions)  # logits of every row
    with torch.inference_mode():
        logits = stage(torch.tensor(tokens), context, cache)
    agree = logits.argmax(-1) == model.logits(tokens).argmax(-1)
    assert logits.dtype == torch.float32
    assert agree.float().mean() > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_the_rope_settings_mean_the_same(family: str) -> None:
    written = transformers_config(family).to_dict()
    parameters = written.pop("rope_parameters")
    published = written | {
        "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", **published_rope(parameters["mscale"])},
    }
    assert ModelConfig.from_dict(published) == oracle(family).config
