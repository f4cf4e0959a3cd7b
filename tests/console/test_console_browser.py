"""The console in a real browser, against a server that says what each test scripts."""

import ast
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.ingress.console import add_console
from tests.console.browser import CHROMIUM, Page, chromium, until
from tests.scripted_api import MODELS, Scripted, ScriptedApi, scripted_api

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: `make chromium` installs it"
)

KEY = "sk-not-to-be-shown"
TOKENS = ("def", " f", "():", "\n    ", "pass", " # é")
ANSWER = "def f():\n    pass # é"
STATS = "document.querySelector('.stats')?.textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium") / "profile") as page:
        yield page


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    with scripted_api(add_console) as api:
        yield api


@pytest.fixture
def page(browser: Page, api: ScriptedApi, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The console with its models listed; a picture is left in SCREENSHOTS if that is set."""
    browser.open(f"{api.url}/")
    browser.wait("document.querySelector('#model').value")
    browser.asked.clear()
    browser.complaints.clear()
    yield browser
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{request.node.name}.png")


def send(page: Page, message: str) -> None:
    page.type("#message", message)
    page.press("Enter", control=True)


def error_line(page: Page) -> str:
    page.wait("!document.querySelector('#error').hidden")
    return page.text("#error")


def tooltip(page: Page) -> list[str]:
    """The tooltip's lines: the chosen token, then its alternatives."""
    lines: list[str] = page.evaluate(
        "document.querySelector('#tooltip').hidden ? [] : "
        "[...document.querySelector('#tooltip').children].map((line) => line.innerText)"
    )
    return [" ".join(line.split()) for line in lines]


def test_the_page_loads_without_complaint_and_asks_nobody_else(
    browser: Page, api: ScriptedApi
) -> None:
    browser.asked.clear()
    browser.complaints.clear()
    browser.open(f"{api.url}/")
    browser.wait("document.querySelector('#model').value")
    assert browser.complaints == []
    wanted = {"/", "/console.css", "/console.js", "/v1/models"}
    assert {url for url in browser.asked if not url.startswith("data:")} == {
        api.url + path for path in wanted
    }
    options = browser.evaluate("[...document.querySelector('#model').options].map((o) => o.value)")
    assert tuple(options) == MODELS


def test_a_chat_streams_tokens_with_their_probabilities_and_its_speed(
    page: Page, api: ScriptedApi
) -> None:
    api.answers.append(Scripted(TOKENS, unsaid=("<end>",)))
    page.type("#system", "Be brief.")
    page.type("#temperature", "0.5")
    page.type("#max-tokens", "7")
    send(page, "Write f.")
    stats = page.wait(STATS)
    assert stats.startswith("7 tokens · ")
    assert " tokens/s · first token after " in stats
    assert stats.endswith(" ms · stop")
    spans = "[...document.querySelectorAll('.assistant .token:not(.unsaid)')]"
    assert page.evaluate(f"{spans}.map((span) => span.textContent)") == list(TOKENS)
    assert page.text(".token.unsaid") == "<end>"
    assert api.seen[-1].body == {
        "model": "scripted",
        "temperature": 0.5,
        "max_tokens": 7,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Write f."},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert "authorization" not in api.seen[-1].headers
    assert page.complaints == []


def test_a_token_shows_its_alternatives_under_the_pointer_and_by_keys(
    page: Page, api: ScriptedApi
) -> None:
    api.answers.append(Scripted(TOKENS))
    send(page, "Write f.")
    page.wait(STATS)
    page.point_at(".token:nth-child(2)")
    expected = ["␣f 50.0 %", "␣f 50.0 %", "␣f0 25.0 %", "␣f1 12.5 %", "␣f2 6.25 %", "␣f3 3.13 %"]
    until(lambda: tooltip(page) == expected, "the tooltip")
    page.press("Escape")
    assert tooltip(page) == []
    page.evaluate("document.querySelector('.assistant .output').focus()")
    for _ in range(3):
        page.press("ArrowRight")
    assert tooltip(page)[0] == "(): 50.0 %"
    shade = "getComputedStyle(document.querySelector('.token')).getPropertyValue('--doubt')"
    assert float(page.evaluate(shade)) == pytest.approx(0.5)


def test_the_next_turn_repeats_the_conversation(page: Page, api: ScriptedApi) -> None:
    api.answers.extend([Scripted(TOKENS, unsaid=("<end>",)), Scripted(("Yes",))])
    send(page, "Write f.")
    page.wait(STATS)
    send(page, "Is it good?")
    page.wait("document.querySelectorAll('.stats')[1]?.textContent")
    assert api.seen[-1].body["messages"] == [
        {"role": "user", "content": "Write f."},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Is it good?"},
    ]


def test_stop_ends_the_request_and_keeps_what_was_said(page: Page, api: ScriptedApi) -> None:
    api.answers.extend([Scripted(TOKENS, ending="hang"), Scripted(("Yes",))])
    send(page, "Write f.")
    page.wait("document.querySelectorAll('.token').length === 6")
    page.click("#chat .stop")
    assert api.gone.wait(10)
    assert page.wait(STATS).endswith("stopped")
    send(page, "Go on.")
    page.wait("document.querySelectorAll('.stats')[1]?.textContent")
    assert api.seen[-1].body["messages"][1] == {"role": "assistant", "content": ANSWER}
    assert page.evaluate("document.querySelector('#error').hidden")


def test_the_middle_is_filled_in_between_prefix_and_suffix(page: Page, api: ScriptedApi) -> None:
    api.answers.append(Scripted(("    return", " 1", "\n"), unsaid=("<end>",)))
    page.click("#tab-fim")
    page.type("#prefix", "def f():\n")
    page.type("#suffix", "\nf()")
    page.click("#fim .send")
    page.wait("document.querySelector('#middle .stats')?.textContent")
    said = "[...document.querySelectorAll('#middle .token:not(.unsaid)')]"
    middle = page.evaluate(f"{said}.map((span) => span.textContent).join('')")
    assert middle == "    return 1\n"
    assert api.seen[-1].path == "/v1/completions"
    assert api.seen[-1].body == {
        "model": "scripted",
        "prompt": "def f():\n",
        "suffix": "\nf()",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 5,
    }
    page.point_at("#middle .token:nth-child(2)")
    until(lambda: len(tooltip(page)) == 7, "the token and six alternatives")
    assert page.complaints == []


def test_without_a_key_the_refusal_is_shown_and_with_it_the_answer(
    page: Page, api: ScriptedApi
) -> None:
    api.key = KEY
    send(page, "Hello")
    assert error_line(page) == "This key is unknown."
    assert page.evaluate("document.querySelector('#message').value") == "Hello"
    api.answers.append(Scripted(("Hi",)))
    page.type("#key", KEY)
    send(page, "Hello")
    page.wait(STATS)
    assert api.seen[-1].headers["authorization"] == f"Bearer {KEY}"
    assert page.evaluate("document.querySelector('#error').hidden")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Scripted(("ab",), ending="error", error="The engine is gone."), "The engine is gone."),
        (Scripted(("ab",), ending="cut"), "The connection to the server was lost."),
        (Scripted(refused="max_tokens is too large."), "max_tokens is too large."),
    ],
    ids=["error event", "connection lost", "refused"],
)
def test_what_went_wrong_is_one_line_and_the_turn_is_taken_back(
    page: Page, api: ScriptedApi, answer: Scripted, line: str
) -> None:
    api.answers.extend([answer, Scripted(("Yes",))])
    send(page, "Hello")
    assert error_line(page) == line
    assert page.evaluate("document.querySelector('#message').value") == "Hello"
    page.press("Enter", control=True)
    page.wait("document.querySelector('.turn:last-child:not(.failed) .stats')?.textContent")
    assert api.seen[-1].body["messages"] == [{"role": "user", "content": "Hello"}]


def test_the_last_request_is_copied_without_the_key(page: Page, api: ScriptedApi) -> None:
    page.command("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.command("Emulation.setFocusEmulationEnabled", enabled=True)
    api.answers.append(Scripted(("Yes",)))
    page.type("#key", KEY)
    send(page, 'It\'s \\ "quoted"\n$HOME')
    page.wait(STATS)
    sent = api.seen[-1].body

    page.click("#copy-curl")
    curl = page.evaluate("navigator.clipboard.readText()")
    words = shlex.split(curl)
    assert words[:3] == ["curl", "-N", f"{api.url}/v1/chat/completions"]
    assert "Authorization: Bearer $OPENAI_API_KEY" in words
    assert json.loads(words[words.index("-d") + 1]) == sent

    page.click("#copy-python")
    python = page.evaluate("navigator.clipboard.readText()")
    assert keywords_of(python, "create") == sent
    assert f'base_url="{api.url}/v1"' in python
    assert 'os.environ.get("OPENAI_API_KEY"' in python
    assert KEY not in curl + python


def keywords_of(source: str, function: str) -> dict[str, Any]:
    """The keyword arguments that a program calls a method with."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    [call] = [
        node
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == function
    ]
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_the_network_cuts_them(page: Page, size: int) -> None:
    stream = ': hello\r\n\r\ndata: {"é": 1}\n\nevent: x\ndata:{"b": "ü€"}\r\n\r\ndata: [DONE]\n\n'
    events = page.evaluate(
        f"""(async () => {{
          const {{ readEvents }} = await import("/console.js");
          const bytes = new TextEncoder().encode({json.dumps(stream)});
          const body = new ReadableStream({{
            start(controller) {{
              for (let at = 0; at < bytes.length; at += {size})
                controller.enqueue(bytes.slice(at, at + {size}));
            }},
          }});
          const events = [];
          for await (const event of readEvents(body)) events.push(event);
          return events;
        }})()"""
    )
    assert events == [{"é": 1}, {"b": "ü€"}]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("bytes:\\xc3", "bytes:\\xa9"), "é"),
        (("a", "bSTOP"), "ab"),
        (("not", "it"), "the text"),
    ],
    ids=["halves of a character", "cut in a token", "no tokens of the text"],
)
def test_what_is_shown_is_the_text_whatever_its_tokens(
    page: Page, api: ScriptedApi, tokens: tuple[str, ...], text: str
) -> None:
    api.answers.append(Scripted(tokens, text=text))
    page.click("#tab-fim")
    page.click("#fim .send")
    page.wait("document.querySelector('#middle .stats')?.textContent")
    assert page.text("#middle .output") == text


def test_markup_in_an_answer_stays_text(page: Page, api: ScriptedApi) -> None:
    markup = "<img src=x onerror=alert(1)>"
    api.answers.append(Scripted((markup,)))
    send(page, markup)
    page.wait(STATS)
    assert page.evaluate("document.querySelectorAll('main img').length") == 0
    page.point_at(".token")
    until(lambda: tooltip(page), "the tooltip")
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.text(".assistant .output") == markup
