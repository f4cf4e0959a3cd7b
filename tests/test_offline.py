"""`LLM`: generation from a script, as people know it from elsewhere."""

import json
import os
from collections.abc import Iterator

import pytest

from serving.offline import LLM, SamplingParams
from tests.model.oracle import oracle
from tests.test_local_engine import expected

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["def main():\n", "import os\n\n", "for i in range(10):"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("nano", stages=2, dtype="float32", settings={"gang": {"cache_tokens": 4096}}) as it:
        yield it


def test_greedy_text_is_that_of_transformers(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY, progress=False)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        (choice,) = output.outputs
        assert choice.token_ids == expected(output.prompt_token_ids, 12)
        assert choice.text == llm.tokenizer.decode(choice.token_ids)
        assert choice.finish_reason == "length"


def test_one_prompt_may_be_given_alone_as_text_or_as_ids(llm: LLM) -> None:
    (text,) = llm.generate(PROMPTS[0], GREEDY, progress=False)
    (ids,) = llm.generate(text.prompt_token_ids, GREEDY, progress=False)
    assert ids.outputs[0].token_ids == text.outputs[0].token_ids
    assert ids.prompt is None


def test_choices_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=8, logprobs=2)
    (first,), (again,) = (llm.generate(PROMPTS[0], params, progress=False) for _ in range(2))
    texts = [choice.text for choice in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in again.outputs]
    logprobs = first.outputs[0].logprobs
    assert logprobs is not None
    assert [len(entry.top) for entry in logprobs] == [2] * 8


def test_a_prompt_can_be_scored(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(PROMPTS[0], params, progress=False)
    logprobs = oracle("nano").logits(output.prompt_token_ids).log_softmax(dim=1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0].logprob is None
    for place, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry.logprob == pytest.approx(float(logprobs[place, entry.token]), abs=1e-4)


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY, progress=False)
    stop = whole.outputs[0].text[4:7]
    params = SamplingParams(temperature=0.0, max_tokens=12, stop=stop)
    (cut,) = llm.generate(PROMPTS[0], params, progress=False)
    assert cut.outputs[0].text == whole.outputs[0].text.partition(stop)[0]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)


def test_the_middle_is_filled_in(llm: LLM) -> None:
    fim = llm.tokenizer.fim
    assert fim is not None
    (output,) = llm.generate("a = ", GREEDY, suffixes=["\nprint(a)"], progress=False)
    ids = output.prompt_token_ids
    assert [ids.index(token) for token in (fim.begin, fim.hole, fim.end)] == [
        1,
        2 + len(llm.tokenizer.encode_text("a = ")),
        len(ids) - 1,
    ]


def test_chat_can_call_tools_and_follow_a_schema(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Add."}]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=300)
    (output,) = llm.chat(talk, params, tools=TOOLS, tool_choice="required", progress=False)
    assert output.outputs[0].tool_calls
    assert isinstance(json.loads(output.outputs[0].tool_calls[0].arguments)["a"], int)
    choice = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=9)
    outputs = llm.chat([talk, talk], choice, progress=False)
    assert [output.outputs[0].text in ("yes", "no") for output in outputs] == [True, True]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"max_tokens": 10**6}, "room"),
        ({"n": 0}, "n"),
        ({"structured_outputs": {"regex": "("}}, "regular expression"),
        ({"allowed_token_ids": [4096]}, "vocabulary"),
    ],
)
def test_what_cannot_be_used_is_a_value_error(llm: LLM, fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llm.generate("x", SamplingParams(**fields), progress=False)
    assert llm.generate("x", GREEDY, progress=False)


def test_nothing_is_left_running() -> None:
    with LLM("nano", expert_parallel=2, settings={"gang": {"cache_tokens": 4096}}) as it:
        pids = it._engine.gang._launcher.pids.values()  # type: ignore[attr-defined]
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    it.close()
