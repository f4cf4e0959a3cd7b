"""What a generation from a script gives, and how a choice comes from an engine's tokens."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from serving.api.delta import CallDelta, Delta
from serving.engine.request import PromptScores, Request, TokenOutput
from serving.ingress.text import TextStream


@dataclass(slots=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | None  # the stop string that ended it
    logprobs: list[TokenOutput] | None  # each token's own and the likeliest ones'
    tool_calls: list[CallDelta] = field(default_factory=list)


@dataclass(slots=True)
class RequestOutput:
    """What one prompt gave."""

    prompt: str | None  # None for one given as token ids, or as messages
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenOutput] | None = None  # the first one's are None


async def gathered(
    request: Request,
    index: int,
    stream: AsyncIterator[TokenOutput | PromptScores],
    text: TextStream,
    parse: Callable[[Delta], Delta] | None,
) -> tuple[CompletionOutput, list[TokenOutput]]:
    """One choice, and its prompt's tokens as far as they were scored.

    Args:
        parse: tells the calls of tools from what is said.
    """
    prompt = [TokenOutput(request.id, token) for token in request.prompt]
    whole = Delta()
    async for output in stream:
        if isinstance(output, PromptScores):
            output.fill(prompt)
            continue
        delta = text.push([output])
        whole.add(delta if parse is None else parse(delta))
        if text.stopped:
            break
    said = whole.tokens
    choice = CompletionOutput(
        index,
        whole.text,
        [output.token for output in said],
        whole.finish_reason,
        whole.stop_string,
        said if request.sampling.logprobs is not None else None,
        whole.calls,
    )
    return choice, prompt
