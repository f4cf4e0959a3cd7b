"""Prompts are code, seeded, and bounded."""

import pytest

from loadtest.workload import MAX_CHARACTERS, Workload


def test_a_prompt_depends_on_seed_and_number_alone():
    first, second = Workload(3, "completions"), Workload(3, "completions")
    backwards = [second.prompt(number) for number in reversed(range(20))]
    assert [first.prompt(number) for number in range(20)] == backwards[::-1]
    assert first.prompt(0) != Workload(4, "completions").prompt(0)


def test_completions_are_plain_and_fill_in_the_middle():
    prompts = [Workload(0, "completions", fim_share=0.5).prompt(number) for number in range(100)]
    assert 30 < sum(prompt.kind == "fim" for prompt in prompts) < 70
    for prompt in prompts:
        assert (prompt.suffix is not None) == (prompt.kind == "fim") == ("suffix" in prompt.body())
        assert len(prompt.text) <= MAX_CHARACTERS
        assert prompt.text.strip()


def test_completions_are_plain_unless_told_otherwise():
    prompts = [Workload(0, "completions").prompt(number) for number in range(20)]
    assert {prompt.kind for prompt in prompts} == {"completion"}


def test_chats_are_questions_about_code():
    prompt = Workload(0, "chat").prompt(1)
    (message,) = prompt.body()["messages"]
    assert message["role"] == "user"
    assert "```python\n" in message["content"]


def test_lengths_vary_and_prefixes_are_shared():
    texts = [Workload(1, "completions").prompt(number).text for number in range(300)]
    lengths = sorted(len(text) for text in texts)
    assert lengths[-1] > 4 * lengths[len(lengths) // 10]
    beginnings = [text[:200] for text in texts]
    assert len(set(beginnings)) < 0.9 * len(beginnings)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_prompts_look_like_python(endpoint):
    prompts = [Workload(2, endpoint).prompt(number).text for number in range(40)]
    assert sum(word in text for text in prompts for word in ("def ", "import ", "self")) > 40
