"""Every field of every body, given what no client should send, while another client's stream runs.

Whatever comes, the answer is a success or a 4xx that is small and does not repeat the input, it
comes soon, and the stream beside it goes on as if nothing had happened. `pytest -s` prints
what took longest.
"""

import json
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from serving.ingress import restrictions
from tests.ingress.abuse import BODIES, CANARY, ask, fields, nested, serving, with_value

# Raw JSON: some of it nothing in Python can say.
VALUES = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "one": "1",
    "minus one": "-1",
    "half": "0.5",
    "a thousand million": "1000000000",
    "2**31": str(2**31),
    "2**63": str(2**63),
    "-2**63 - 1": str(-(2**63) - 1),
    "2**64": str(2**64),
    "4,000 digits": "9" * 4000,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "1e999": "1e999",
    "1e-999": "1e-999",
    "empty string": '""',
    "canary": f'"{CANARY}"',
    "number as string": '"1"',
    "NUL": f'"{CANARY}\\u0000"',
    "half a surrogate pair": f'"{CANARY}\\ud800"',
    "the other half": '"\\udc00"',
    "special tokens": '"<｜begin▁of▁sentence｜><｜fim▁hole｜><｜end▁of▁sentence｜><|EOT|>"',
    "regex": f'"({CANARY}"',
    "empty list": "[]",
    "empty object": "{}",
    "list of null": "[null]",
    "list of lists": "[[[[]]]]",
    "list of true": "[true]",
    "list of halves": "[0.5]",
    "list of negatives": "[-1]",
    "last id and over": "[4095, 4096]",
    "over the vocabulary": "[102400]",
    "id of 2**31": "[2147483648]",
    "list of canaries": f'["{CANARY}", "{CANARY}"]',
    "mixed list": f'["{CANARY}", 1, null, [], {{}}]',
    "unknown type": f'{{"type": "{CANARY}"}}',
    "list of unknown type": f'[{{"type": "{CANARY}", "role": "{CANARY}"}}]',
    "refers to itself": '{"$ref": "#"}',
    "key of half a pair": '{"\\ud800": 1}',
    "key twice": f'{{"type": "text", "type": "{CANARY}"}}',
    "150 levels": nested("[", "]", 150),
    "150 levels of objects": nested('{"items": ', "}", 150),
    "10,000 levels": nested("[", "]", 10_000),
    "10,000 levels of objects": nested('{"items": ', "}", 10_000),
}
LARGE = {
    "5 MB": json.dumps(CANARY * 833_333),
    "100,000 ids": json.dumps([5] * 100_000),
    "100,000 negatives": json.dumps([-1] * 100_000),
    "100,000 strings": json.dumps(["x"] * 100_000),
    "100,000 lists": json.dumps([[1]] * 100_000),
    "100,000 objects": json.dumps([{}] * 100_000),
    "100,000 keys": json.dumps({f"{i}": 1 for i in range(100_000)}),
}
BROKEN = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "string": b'"c4n4ry"',
    "NaN": b"NaN",
    "half": b'{"model": "c4n4ry',
    "two": b'{"model": "nano"} {"model": "c4n4ry"}',
    "invalid UTF-8": b'{"model": "c4n4ry\xff\xfe"}',
    "UTF-16": '{"model": "c4n4ry"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"model": "c4n4ry"}',
    "NUL": b"\x00" * 100,
    "duplicate keys": b'{"model": "nano", "model": {"c4n4ry": 1}}',
    "half a pair as key": b'{"\\ud800": 1}',
    "10,000 levels": b"[" * 10_000,
    "a million levels": b'{"a":' * 1_000_000,
    "100,000 digits": b'{"n": ' + b"9" * 100_000 + b"}",
    "a million decimals": b'{"temperature": 0.' + b"1" * 1_000_000 + b"}",
    "5 MB of spaces": b" " * 5_000_000,
    "9 MB": b'{"model": "' + b"c4n4ry" * 1_500_000 + b'"}',
}

MAY_BE_LARGE = ("prompt", "messages", "input", "tools", "tokens", "system", "logit_bias", "text")
# Where a JSON schema may stand, and a regex, a grammar or a choice.
SCHEMAS_GO = {
    "guided_json": ("completions", "guided_json", "%s"),
    "response_format": ("chat", "response_format",
                        '{"type": "json_schema", "json_schema": {"name": "n", "schema": %s}}'),
    "tools": ("chat", "tools",
              '[{"type": "function", "function": {"name": "f", "parameters": %s}}]'),
    "text": ("responses", "text",
             '{"format": {"type": "json_schema", "name": "n", "schema": %s}}'),
    "responses tools": ("responses", "tools",
                        '[{"type": "function", "name": "f", "parameters": %s}]'),
    "messages tools": ("messages", "tools", '[{"name": "f", "input_schema": %s}]'),
    "count_tokens tools": ("count_tokens", "tools", '[{"name": "f", "input_schema": %s}]'),
}  # fmt: skip
SCHEMAS = {
    "itself": '{"$ref": "#"}',
    "recursive": '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
    "each other": '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},'
                  ' "$ref": "#/$defs/a"}',
    "remote": '{"$ref": "http://127.0.0.1:9/c4n4ry.json"}',
    "file": '{"$ref": "file:///etc/c4n4ry"}',
    "dialect": '{"$schema": "http://127.0.0.1:9/c4n4ry"}',
    "5,000 values": json.dumps({"enum": [f"{CANARY}{i}" for i in range(5000)]}),
    "1,000 options": json.dumps({"anyOf": [{"const": f"{CANARY}{i}"} for i in range(1000)]}),
    "never": '{"type": "integer", "minimum": 5, "maximum": 1}',
    "never either": '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
    "nothing": '{"not": {}}',
    "a thousand million items": '{"type": "array", "minItems": 1000000000}',
    "a thousand million characters": '{"type": "string", "minLength": 1000000000}',
    "a negative length": '{"type": "string", "minLength": -1}',
    "bad pattern": '{"type": "string", "pattern": "(c4n4ry"}',
    "catastrophic pattern": '{"type": "string", "pattern": "^((a+)+)+$"}',
    "lookahead": '{"type": "string", "pattern": "(?=c4n4ry)"}',
    "multiple of nothing": '{"type": "number", "multipleOf": 0}',
    "NaN": '{"type": "number", "minimum": NaN}',
    "4,000 digits": f'{{"type": "integer", "minimum": {"9" * 4000}}}',
    "half a pair": '{"enum": ["\\ud800"]}',
    "NUL": '{"enum": ["\\u0000"]}',
    "unknown type": '{"type": "c4n4ry"}',
    "150 levels": nested('{"items": ', "}", 150).replace("1}", "{}}"),
    "10,000 levels": nested('{"items": ', "}", 10_000),
    "own options": '{"type": "object", "properties": {"a": {"x-guidance": 7}}}',
    "2**60 ways": json.dumps({"$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}
                                        for i in range(60)}, "$ref": "#/$defs/a0"}),
}  # fmt: skip
REGEXES = [
    "(c4n4ry", "[c4n4ry", "a{2,1}", "((a+)+)+$", "(((a{1,1000}){1,1000}){1,1000}){1,1000}",
    "(?=c4n4ry)", "\\1", "(?R)", "\\p{c4n4ry}", "\\p{L}{1,10000}", "a" * 32768, "(" * 10_000,
    "(.*a){50}", "(a|b)*a(a|b){300}", "\\u{110000}", "\x00", "^", "$", ".{0,100000}",
]  # fmt: skip
GRAMMARS = [
    "start: start", "start: /(c4n4ry/", "start:", "c4n4ry", 'start: "a"~1..100000', 'start: "',
    "start: " + "(" * 10_000, "%import c4n4ry", '%include "/etc/c4n4ry"', "start: <c4n4ry>",
    "start: <[1-1000000]>", 'start: %json {"$ref": "http://127.0.0.1:9/c4n4ry"}', "start: %json {",
    "root ::= root", "root ::= " + "(" * 5000, 'root ::= "a" root | ""', "start: a\na: b\nb: a",
    "start: start start | \"a\" | ", '{"grammars": []}', "%llguidance {", 'start: "\x00"',
    "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"',
]  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_no_value_of_any_field_is_more_than_a_refusal(name: str) -> None:
    with serving() as server:
        for key in fields(name):
            for label, raw in VALUES.items():
                server.post(name, with_value(name, key, raw), f"{key}: {label}")


@pytest.mark.parametrize("name", BODIES)
def test_no_large_value_of_any_field_takes_long(name: str) -> None:
    labels = list(LARGE)
    with serving() as server:
        for place, key in enumerate(fields(name)):
            # All of them where something large may be meant, one in turn elsewhere.
            chosen = labels if key in MAY_BE_LARGE else [labels[place % len(labels)]]
            for label in chosen:
                server.post(name, with_value(name, key, LARGE[label]), f"{key}: {label}")


def test_what_is_no_object_of_json_is_refused() -> None:
    with serving() as server:
        for name in BODIES:
            for label, body in BROKEN.items():
                reply = server.post(name, body, label)
                assert reply.status == (413 if label == "9 MB" else 400), label


CHECKS = list(HealthCheck)  # all of them: how long a draw takes is no matter
NUMBERS = st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 0.1, -0.0, 1e308, 5e-324])
TEXTS = st.sampled_from(["", "x", "text", "json_schema", "function", "auto", "\ud83d", "\x00", "("])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | st.text(max_size=5)
KEYS = TEXTS | st.sampled_from(["type", "role", "content", "name", "function", "schema", "json"])
ANY: SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
)


def test_whatever_else_a_few_fields_hold_is_answered_or_refused() -> None:
    with serving() as server:

        @settings(
            max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(data=st.data())
        def any_values(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(list(BODIES)))
            keys = st.sampled_from([*fields(name), "no_such_field"])
            given = data.draw(st.dictionaries(keys, ANY, min_size=1, max_size=3))
            server.post(name, json.dumps(BODIES[name] | given).encode(), ", ".join(given))

        any_values()


@pytest.mark.parametrize("place", SCHEMAS_GO)
def test_no_schema_does_more_than_fail_its_own_request(place: str) -> None:
    name, key, value = SCHEMAS_GO[place]
    with serving() as server:
        for label, schema in SCHEMAS.items():
            server.post(name, with_value(name, key, value % schema), f"{key}: {label}")


@pytest.mark.parametrize(("key", "sources"), [("regex", REGEXES), ("grammar", GRAMMARS)])
def test_no_regex_and_no_grammar_does_more_than_fail_its_own_request(
    key: str, sources: list[str]
) -> None:
    with serving() as server:
        for source in sources:
            for field_name, value in [
                (f"guided_{key}", json.dumps(source)),
                ("structured_outputs", json.dumps({key: source})),
            ]:
                body = with_value("completions", field_name, value)
                server.post("completions", body, f"{key}: {source[:20]!r}")


ARGUMENTS = {"text": "[1, ", "deep": nested("[", "]", 100_000), "deepish": nested("[", "]", 900),
             "a million": "[" * 1_000_000, "digits": "9" * 5000, "NaN": "NaN",
             "half a pair": '"\\ud800"'}  # fmt: skip


@pytest.mark.parametrize("label", ARGUMENTS)
def test_arguments_of_an_earlier_call_may_be_any_text(label: str) -> None:
    call = {"name": "f", "arguments": ARGUMENTS[label]}
    tool_calls = [{"id": "a", "type": "function", "function": call}]
    given = {
        "chat": ("messages", [{"role": "assistant", "tool_calls": tool_calls}]),
        "responses": ("input", [{"type": "function_call", "call_id": "a", **call}]),
    }
    with serving() as server:
        for name, (key, value) in given.items():
            server.post(name, with_value(name, key, json.dumps(value)), f"{key}: {label}")


def test_whose_grammar_waits_for_others_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restrictions, "_TURN_TIMEOUT_S", 0.1)
    with serving() as server:
        others = Event()
        server.it.service._restrictions._pool.submit(others.wait)
        body = with_value("completions", "guided_regex", '"a"')
        reply = server.do(ask(server.it.app, "/v1/completions", body))
        others.set()
        assert reply.status == 503
