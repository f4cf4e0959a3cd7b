"""The oracle finds what a fault may do to an answer, and nothing where there is nothing."""

from copy import deepcopy

import pytest

from loadtest.oracle import compare
from loadtest.sse import GrammarError, StreamCheck
from loadtest.transcript import Choice, Transcript
from tests.loadtest.stub import chunk, usage

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]


def answer() -> Transcript:
    choices = {
        index: Choice(list(TOKENS), "some text", [-0.5] * len(TOKENS), "length") for index in (0, 1)
    }
    return Transcript(choices, prompt_tokens=5, output_tokens=2 * len(TOKENS))


def test_the_same_answer_is_right() -> None:
    verdict = compare(answer(), answer())
    assert verdict.right
    assert str(verdict) == "as undisturbed"


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([11, 12, 13, 13, 14, 15, 16, 17, 18], (0, 1, 0)),
        ([11, 12, 13, 11, 12, 13, 14, 15, 16, 17, 18], (0, 3, 0)),
        ([11, 12, 14, 15, 16, 17, 18], (1, 0, 0)),
        ([11, 12, 13], (5, 0, 0)),
        ([], (8, 0, 0)),
        ([11, 12, 99, 14, 15, 16, 17, 18], (0, 0, 1)),
        ([11, 12, 13, 14, 15, 16, 17, 18, 19], (0, 1, 0)),
    ],
)
def test_lost_doubled_and_different_tokens_are_counted(
    tokens: list[int], found: tuple[int, int, int]
) -> None:
    said = answer()
    said.choices[1].tokens = tokens
    said.output_tokens = said.received
    verdict = compare(answer(), said)
    assert (verdict.lost, verdict.added, verdict.changed) == found
    assert verdict.tokens == sum(found)
    assert not verdict.right
    assert not verdict.faults


def test_a_choice_that_never_came_is_lost() -> None:
    said = answer()
    del said.choices[1]
    said.output_tokens = said.received
    verdict = compare(answer(), said)
    assert verdict.lost == len(TOKENS)
    assert verdict.faults == ["choice 1 finished by None, not length"]


def test_a_wrong_finish_is_found() -> None:
    said = answer()
    said.choices[0].finish_reason = "stop"
    assert compare(answer(), said).faults == ["choice 0 finished by stop, not length"]


@pytest.mark.parametrize(("prompt", "output"), [(5, 15), (5, 17), (6, 16)])
def test_usage_that_is_not_what_came_is_found(prompt: int, output: int) -> None:
    said = answer()
    said.prompt_tokens, said.output_tokens = prompt, output
    (fault,) = compare(answer(), said).faults
    assert fault.startswith("usage says")


def test_text_and_logprobs_of_the_right_tokens_are_compared_too() -> None:
    said = answer()
    said.choices[0].text = "some txt"
    said.choices[1].logprobs[3] += 0.01
    assert len(compare(answer(), said).faults) == 2
    said = answer()
    said.choices[0].logprobs[0] = float("nan")
    said.choices[1].logprobs.append(-0.5)
    assert len(compare(answer(), said).faults) == 2
    said = answer()
    said.choices[1].logprobs[3] += 1e-5
    assert compare(answer(), said).right


def test_of_a_client_that_left_only_the_beginning_is_judged() -> None:
    said = answer()
    said.output_tokens = None
    for choice in said.choices.values():
        choice.tokens, choice.text = choice.tokens[:3], choice.text[:4]
        choice.logprobs, choice.finish_reason = choice.logprobs[:3], None
    assert compare(answer(), said, whole=False).right
    wrong = deepcopy(said)
    wrong.choices[0].tokens = [11, 13, 14]
    assert compare(answer(), wrong, whole=False).tokens
    assert not compare(answer(), said).right


def test_a_transcript_holds_what_the_chunks_said() -> None:
    check = StreamCheck()
    told = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
    choice = {"index": 0, "text": "ab", "finish_reason": None, "token_ids": [1, 2]}
    assert check.feed(chunk(choices=[choice | {"logprobs": told}]))
    delta = {"delta": {"content": "c"}, "logprobs": {"content": [{"logprob": -3.0}]}}
    assert check.feed(chunk(choices=[{"index": 1, "token_ids": [3], **delta}]))
    for index in (0, 1):
        check.feed(chunk("", "stop", index))
    check.feed(usage(7, 3))
    said = check.transcript
    assert said.choices[0] == Choice([1, 2], "ab", [-1.0, -2.0], "stop")
    assert said.choices[1] == Choice([3], "c", [-3.0], "stop")
    assert (said.prompt_tokens, said.output_tokens, said.received) == (7, 3, 3)


def test_an_answer_that_is_not_streamed_is_held_to_the_same() -> None:
    check = StreamCheck()
    message = {"message": {"role": "assistant", "content": "c"}, "finish_reason": "stop"}
    counts = {"usage": {"prompt_tokens": 7, "completion_tokens": 1}}
    check.whole(chunk(choices=[{"index": 0, "token_ids": [3], **message}], **counts))
    check.end()
    assert check.transcript.choices == {0: Choice([3], "c", [], "stop")}
    open_ended = StreamCheck()
    open_ended.whole(chunk("text", **counts))
    with pytest.raises(GrammarError, match="no finish_reason"):
        open_ended.end()
