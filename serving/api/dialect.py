"""What dialects share that are translated into chat requests."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, ValidationError

from serving.api.chat import ChatRequest
from serving.api.errors import refusal

CallId = Annotated[str, Field(min_length=1, max_length=256)]


def by_type(reason: str, absent: str | None = None) -> Discriminator:
    """Tells the members of a union apart by their `type`.

    Args:
        reason: what the client is told of a type that is none of theirs.
        absent: the type of an object that does not say.
    """

    def tag(value: Any) -> str | None:
        if isinstance(value, dict):
            value = value.get("type", absent)
        else:  # a string where the union has one, or a member already made
            value = getattr(value, "type", value)
        return value if isinstance(value, str) else None

    return Discriminator(tag, custom_error_type="type", custom_error_message=reason)


def translated(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """A chat request made from another dialect's fields.

    Args:
        fields: by the chat request's names; None stands for a field that is left out.
        names: what the dialect calls those fields that it has another name for.

    Raises:
        ApiError: 400, the chat request refuses one of them, or their combination.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise refusal(error, names) from None
