"""Function calls for a model whose template knows no tools.

One form, in both directions. The system message lists the functions, one JSON object a line, and
tells the model to write a call as

    <tool_call>
    {"name": "NAME", "arguments": {…}}
    </tool_call>

Results go back in a user's turn as

    <tool_result>
    {"tool_call_id": "ID", "content": "…"}
    </tool_result>

A grammar makes sure of the form: from the first token on where a call is required, and else from
the moment that the model has written `<tool_call>`. So the parser meets nothing but this form.
"""

import json
import secrets
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from serving.api.chat import ChatRequest, Function, Message, NamedTool, tool_arguments
from serving.api.delta import CallDelta, Delta
from serving.grammar import json_schema
from serving.ingress.prompts import Turn
from serving.ingress.text import StopStrings

BEGIN = "<tool_call>"
_NAME = '\n{"name": "'
_ARGUMENTS = '", "arguments": '
_END = "}\n</tool_call>"

_INSTRUCTIONS = """You may call these functions, each described by one line of JSON:
{functions}
To call a function, write:
<tool_call>
{{"name": "FUNCTION", "arguments": {{...}}}}
</tool_call>
The results come back between <tool_result> and </tool_result>."""


class Tools:
    """The functions of one request, and whether they must be called.

    Attributes:
        mode: `required` where the answer has to be a call.
    """

    mode: Literal["auto", "required"]

    def __init__(self, body: ChatRequest) -> None:
        wanted = set(body.chosen_tools)
        functions = [tool.function for tool in body.tools or ()]
        self._functions = [f for f in functions if not wanted or f.name in wanted]
        self._parallel = body.parallel_tool_calls is not False
        self.named = isinstance(body.tool_choice, NamedTool)
        choice = body.tool_choice
        required = self.named or choice == "required"
        if choice is not None and not isinstance(choice, str | NamedTool):
            required = choice.allowed_tools.mode == "required"
        self.mode = "required" if required else "auto"

    @classmethod
    def of(cls, body: ChatRequest) -> "Tools | None":
        """None where no function may be called."""
        return None if not body.tools or body.tool_choice == "none" else cls(body)

    def instructions(self) -> str:
        """What the model is told of them."""
        lines = [json.dumps(_description(f), ensure_ascii=False) for f in self._functions]
        return _INSTRUCTIONS.format(functions="\n".join(lines))

    def grammar(self, text: str | None, closed: bool = True) -> str:
        """Lark for the whole answer.

        Args:
            text: what an answer without calls has to be, as a Lark expression; None: anything.
            closed: as in `json_schema`.
        """
        calls = "call (_NEXT call)*" if self._parallel and not self.named else "call"
        rules = []
        if self.mode == "required":
            rules.append(f'start: "{BEGIN}" {calls}')
        elif text is not None:
            rules.append(f'start: "{BEGIN}" {calls} | answer\nanswer: {text}')
        else:
            rules += [f"start: head {calls} | TEXT", f'head[lazy]: TEXT "{BEGIN}"']
            rules.append(r"TEXT: /(.|\n)*/")
        rules.append(f'_NEXT: "\\n{BEGIN}"')
        options = " | ".join(f"call_{i}" for i in range(len(self._functions)))
        rules.append(f"call: {options}")
        for i, function in enumerate(self._functions):
            head = json.dumps(f"{_NAME}{function.name}{_ARGUMENTS}")
            schema = function.parameters or {"type": "object", "additionalProperties": False}
            body = json.dumps(json_schema(schema, closed))
            rules.append(f"call_{i}: {head} %json {body} {json.dumps(_END)}")
        return "%llguidance {}\n" + "\n".join(rules) + "\n"

    def parser(self) -> "CallParser":
        return CallParser(self.named, self.mode == "required")


def conversation(messages: Sequence[Message], tools: Tools | None) -> list[Turn]:
    """Turns that the template knows: tools go to the system's, results to a user's."""
    turns: list[Turn] = []
    for is_result, run in groupby(messages, key=lambda message: message.role == "tool"):
        if is_result:
            turns.append(Turn("user", "\n".join(map(_written_result, run))))
            continue
        for message in run:
            role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, message.text + _written_calls(message)))
    if tools is not None:
        system = turns.pop(0).text if turns and turns[0].role == "system" else ""
        told = f"{system}\n\n{tools.instructions()}" if system else tools.instructions()
        turns.insert(0, Turn("system", told))
    return turns


def _description(function: Function) -> dict[str, Any]:
    return function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)


def _written_result(message: Message) -> str:
    content = {"tool_call_id": message.tool_call_id, "content": message.text}
    return f"<tool_result>\n{json.dumps(content, ensure_ascii=False)}\n</tool_result>"


def _written_calls(message: Message) -> str:
    calls = []
    for call in message.tool_calls or ():
        arguments = tool_arguments(call.function.arguments)
        written = {"name": call.function.name, "arguments": arguments}
        calls.append(f"{BEGIN}\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>")
    between = "\n" if message.text and calls else ""
    return between + "\n".join(calls)


class CallParser:
    """Tells an answer's text from the calls in it, delta by delta.

    Args:
        named: the client named the function, so that a call is no finish reason of its own.
        required: the answer has no text.
    """

    def __init__(self, named: bool, required: bool) -> None:
        self._named = named
        self._required = required
        self._calls = 0
        self._text = StopStrings([BEGIN])
        self._rest = ""  # of a call, not parsed yet
        self._inside: Literal["text", "head", "arguments", "end"] = "text"
        self._arguments = _JsonEnd()

    def push(self, delta: Delta) -> Delta:
        """The delta with its text sorted into text and calls."""
        text, delta.text = delta.text, ""
        while text:
            text = self._step(text, delta)
        if delta.finish_reason is not None:
            if self._inside == "text" and not (self._required or self._calls):
                delta.text += self._text.flush()  # else the beginning of a call that was cut off
            if self._calls and not self._named and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"
        return delta

    def _step(self, text: str, delta: Delta) -> str:
        """Takes one kind of text; returns what comes after it."""
        if self._inside == "text":
            shown, begun = self._text.push(text)
            if self._calls and not shown.strip():
                shown = ""  # the line break between two calls
            delta.text += shown
            if not begun:
                return ""
            self._inside, rest = "head", self._text.rest
            return rest
        if self._inside == "arguments":
            end = self._arguments.find(text)
            if text[:end]:
                self._say(text[:end], delta)
            if self._arguments.complete:
                self._inside = "end"
            return text[end:]
        self._rest += text
        return self._head(delta) if self._inside == "head" else self._end()

    def _say(self, arguments: str, delta: Delta) -> None:
        """A delta has one piece of a call at most: some clients read no more of one index."""
        index = self._calls - 1
        if delta.calls and delta.calls[-1].index == index:
            delta.calls[-1].arguments += arguments
        else:
            delta.calls.append(CallDelta(index, arguments))

    def _head(self, delta: Delta) -> str:
        name, found, arguments = self._rest.partition(_ARGUMENTS)
        if not found:
            return ""
        self._rest, self._inside, self._arguments = "", "arguments", _JsonEnd()
        call = CallDelta(self._calls, "", f"call_{secrets.token_hex(12)}", name[len(_NAME) :])
        delta.calls.append(call)
        self._calls += 1
        return arguments

    def _end(self) -> str:
        if len(self._rest) < len(_END):
            return ""
        text, self._rest, self._inside = self._rest[len(_END) :], "", "text"
        self._text = StopStrings([BEGIN])
        return text


class _JsonEnd:
    """Finds where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int:
        """How much of the text still belongs to the object."""
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.complete = True
                    return place + 1
        return len(text)
