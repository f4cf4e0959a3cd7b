"""Which field of which endpoint is honoured: `python -m serving.api.support` prints the table."""

from collections.abc import Iterator

from pydantic import BaseModel

from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.messages import MessagesRequest
from serving.api.responses import ResponsesRequest
from serving.api.strict import NoEffect, Refused

COLUMNS: dict[str, type[BaseModel]] = {
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "responses": ResponsesRequest,
    "messages": MessagesRequest,
}
_ABSENT = "–"


def support(shape: type[BaseModel], name: str) -> str:
    """How a request body treats one of its fields."""
    field = shape.model_fields.get(name)
    if field is None:
        return _ABSENT
    for mark in field.metadata:
        if isinstance(mark, Refused):
            return f"refused: {mark.reason}"
        if isinstance(mark, NoEffect):
            return "no effect"
    return "honoured"


def table() -> str:
    """The table in Markdown, a row for each field that some endpoint knows."""
    return "\n".join(_rows()) + "\n"


def _rows() -> Iterator[str]:
    yield f"| field | {' | '.join(COLUMNS)} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    names = sorted({name for shape in COLUMNS.values() for name in shape.model_fields})
    for name in names:
        cells = (support(shape, name) for shape in COLUMNS.values())
        yield f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(), end="")
