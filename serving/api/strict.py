"""What all request bodies have in common: strict types, and an honest answer for every field.

A field is *honoured* unless it is marked: `NO_EFFECT` for one that is accepted because it cannot
change the answer here, `Refused` for one of the original API that this server cannot honour.
Unknown fields are refused by name. The marks are also what the README's table is made from.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Marks a field that is accepted because it cannot change the answer here."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Marks a field that may only be null: `Annotated[None, Refused("why")]`."""

    reason: str = "this server does not support it"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def refuse(value: object) -> object:
            if value is not None:
                raise ValueError(self.reason)
            return value

        return core_schema.no_info_before_validator_function(refuse, handler(source))


NO_EFFECT = NoEffect()


class Strict(BaseModel):
    """A request body, or a part of one: no "1" for 1, no true for 1, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
