"""Engine, gang and network together, as processes of this machine, without Ray."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from serving.config import Settings
from serving.engine.request import Request, RequestError
from serving.gang.gang import GangStartError
from serving.local_engine import Completion, GenerationFailed, LocalEngine, local_engine
from tests.model.oracle import NANO, oracle
from tests.waiting import until

GREEDY = SamplingParams(temperature=0.0)


def settings(tmp_path: Path, stages: int = 1, ranks: int = 1, **gang: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"dtype": "float32"},
            "gang": {
                "stages": stages,
                "expert_parallel": ranks,
                "cache_tokens": 4096,
                "start_timeout_s": 120,
                **gang,
            },
            "telemetry": {"targets_directory": tmp_path / "targets", "log_level": "WARNING"},
        }
    )


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(5)
    return [[4091, *numbers.choices(range(4000), k=5 + 11 * i)] for i in range(count)]


def expected(prompt: list[int], tokens: int) -> list[int]:
    """What transformers generates greedily."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = oracle("nano").reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
    return list(out[0, len(prompt) :].tolist())


async def generate(engine: LocalEngine, requests: list[Request]) -> list[list[int]]:
    return [completion.token_ids for completion in await engine.generate(requests)]


async def assert_nothing_is_held(engine: LocalEngine) -> None:
    await until(lambda: engine.scheduler.idle)
    engine.scheduler.check_integrity()
    assert all(column.held == 0 for column in engine.scheduler.stats().columns)


@pytest.mark.parametrize(
    ("stages", "ranks", "exchange"), [(1, 1, "gather"), (2, 2, "gather"), (2, 2, "all_to_all")]
)
async def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, stages: int, ranks: int, exchange: str
) -> None:
    async with local_engine(settings(tmp_path, stages, ranks, exchange=exchange)) as engine:
        requests = [Request(f"r{i}", p, 40, GREEDY) for i, p in enumerate(prompts(5))]
        for request, tokens in zip(requests, await generate(engine, requests), strict=True):
            assert tokens == expected(request.prompt, 40)
        await assert_nothing_is_held(engine)


async def test_a_sequence_decodes_the_same_alone_and_among_31_others(tmp_path: Path) -> None:
    sampled = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=seed, frequency_penalty=0.2 * (seed % 2))
        for seed in range(16)
    ]
    params = [GREEDY] * 16 + sampled
    async with local_engine(settings(tmp_path, 2, 2)) as engine:
        wanted = [
            Request(f"together{i}", prompt, 12, params[i]) for i, prompt in enumerate(prompts(32))
        ]
        together = await generate(engine, wanted)
        for index in (0, 7, 16, 23, 31):
            alone = Request(f"alone{index}", wanted[index].prompt, 12, params[index], tenant="own")
            assert (await generate(engine, [alone]))[0] == together[index]


async def test_a_cached_prefix_changes_no_token(tmp_path: Path) -> None:
    prompt = prompts(20)[-1]
    async with local_engine(settings(tmp_path, 2, 1)) as engine:
        first = await engine.generate([Request("first", prompt, 16, GREEDY)])
        again = await engine.generate([Request("again", prompt, 16, GREEDY)])
        stats = [completion.tokens[-1].stats for completion in first + again]
    assert again[0].token_ids == first[0].token_ids
    assert [stat.cached_tokens for stat in stats if stat] == [0, len(prompt) // 64 * 64]


async def test_preemption_changes_no_token(tmp_path: Path) -> None:
    wanted = [Request(f"r{i}", prompt, 24, GREEDY) for i, prompt in enumerate(prompts(8))]
    async with local_engine(settings(tmp_path, 2, 1, cache_tokens=384)) as engine:
        got = await generate(engine, wanted)
        preemptions = engine.scheduler.stats().preemptions
        await assert_nothing_is_held(engine)
    assert preemptions > 0
    assert got == [expected(request.prompt, 24) for request in wanted]


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2)])
async def test_a_prompts_scores_are_those_of_transformers(
    tmp_path: Path, stages: int, ranks: int
) -> None:
    scoring = replace(GREEDY, prompt_logprobs=2)
    wanted = [Request(f"r{i}", p, i % 2, scoring) for i, p in enumerate(prompts(14)[1::3])]
    small = {"engine": {"max_step_tokens": 64}}  # every prompt comes in several chunks
    base = settings(tmp_path, stages, ranks)
    chunked = Settings.model_validate(base.model_dump() | small)
    async with local_engine(chunked) as engine:
        for repetition in ("", "again"):  # what others have cached changes nothing
            again = [replace(request, id=request.id + repetition) for request in wanted]
            for request, completion in zip(again, await engine.generate(again), strict=True):
                check_scores(request, completion)
        await assert_nothing_is_held(engine)


def check_scores(request: Request, completion: Completion) -> None:
    logprobs = oracle("nano").logits(request.prompt).log_softmax(dim=1)
    found = [value for scores in completion.scores for value in scores.logprobs]
    tops = [top for scores in completion.scores for top in scores.tops]
    assert len(found) == len(tops) == len(request.prompt) - 1
    for place, (own, top) in enumerate(zip(found, tops, strict=True)):
        assert own == pytest.approx(float(logprobs[place, request.prompt[place + 1]]), abs=1e-4)
        best = logprobs[place].topk(2)
        assert [token for token, _ in top] == best.indices.tolist()
        assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(completion.token_ids) == request.max_tokens


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 6},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


async def test_a_grammar_holds_through_preemption_and_a_return_with_output(tmp_path: Path) -> None:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
    config = ModelConfig.from_directory(NANO)
    tokenizer = Tokenizer.from_directory(NANO, config)
    ends = frozenset({config.eos_token_id})

    def requests(name: str) -> list[Request]:
        return [
            Request(f"{name}{i}", p, 60, SamplingParams(seed=i, grammar=grammar), ends)
            for i, p in enumerate(prompts(6))
        ]

    async with local_engine(settings(tmp_path, 2, 1)) as engine:
        calm = await generate(engine, requests("calm"))
    async with local_engine(settings(tmp_path, 2, 1, cache_tokens=256)) as engine:
        crowded = await generate(engine, requests("crowded"))
        assert engine.scheduler.stats().preemptions > 0
        await assert_nothing_is_held(engine)
    assert crowded == calm
    for tokens in calm:
        if tokens[-1] in ends:
            said = json.loads(tokenizer.decode(tokens))
            assert set(said) == {"name", "tags"}
            assert set(said["tags"]) <= {"a", "b", "c"}
    assert any(tokens[-1] in ends for tokens in calm)


async def test_a_bad_grammar_fails_its_request_alone(tmp_path: Path) -> None:
    bad = SamplingParams(temperature=0.0, grammar="nonsense")
    prompt = prompts(1)[0]
    async with local_engine(settings(tmp_path)) as engine:
        with pytest.raises(GenerationFailed, match="grammar failed"):
            await engine.generate([Request("bad", prompt, 9, bad)])
        assert await generate(engine, [Request("good", prompt, 9, GREEDY)]) == [expected(prompt, 9)]
        await assert_nothing_is_held(engine)


async def test_streams_that_are_left_at_random_leak_nothing(tmp_path: Path) -> None:
    numbers = random.Random(3)

    async def one(engine: LocalEngine, index: int, prompt: list[int]) -> None:
        leave_after = numbers.choice([0, 1, 3, 1000])
        count = 0
        async for _ in engine.stream(Request(f"r{index}", prompt, 24, GREEDY)):
            count += 1
            if count > leave_after:
                break

    async with local_engine(settings(tmp_path, 2, 2)) as engine:
        for round_ in range(2):
            batch = [one(engine, 100 * round_ + i, p) for i, p in enumerate(prompts(12))]
            await asyncio.gather(*batch)
        await assert_nothing_is_held(engine)


async def test_a_request_that_can_never_fit_is_refused(tmp_path: Path) -> None:
    async with local_engine(settings(tmp_path)) as engine:
        with pytest.raises(RequestError, match="exceed the limit of 4096"):
            await engine.generate([Request("long", [1] * 4000, 97, GREEDY)])
        with pytest.raises(RequestError, match="outside the vocabulary"):
            await engine.generate([Request("outside", [4091, 4096], 2, GREEDY)])
        assert (await generate(engine, [Request("good", [4091, 5], 3, GREEDY)]))[0]


async def test_a_checkpoint_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    source = Settings().model.directory
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((source / name).read_bytes())
    whole = (source / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    wanted = settings(tmp_path, 2, 1)
    wanted = wanted.model_copy(
        update={"model": wanted.model.model_copy(update={"path": str(broken)})}
    )
    with pytest.raises(GangStartError, match=r"model\.safetensors") as caught:
        async with local_engine(wanted):
            pass
    assert caught.value.user_error
