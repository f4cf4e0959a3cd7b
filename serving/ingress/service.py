"""From a validated API request to generations, and from generations to an answer."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.answers import Answer, ChatAnswer, CompletionAnswer
from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.delta import Delta, Usage
from serving.api.errors import ApiError, server_fault
from serving.api.json_response import JsonResponse
from serving.api.sampling import Sampling
from serving.config import Settings
from serving.engine.request import Request
from serving.ingress.fleet import FleetClient
from serving.ingress.generation import Generation
from serving.ingress.prompts import Prompts
from serving.ingress.restrictions import Restrictions
from serving.ingress.resume import Engines
from serving.ingress.sampling import SamplingRules
from serving.ingress.streams import Choice, EventStream, merged
from serving.ingress.text import TextStream
from serving.ingress.tools import Tools, conversation
from serving.telemetry.metrics import IngressMetrics

_INLINE_TOKENS = 2048  # longer answers are put together on a thread


@dataclass(frozen=True, slots=True)
class Origin:
    """Who sent an API request, and its name in logs."""

    tenant: str
    request_id: str


@dataclass(frozen=True, slots=True)
class _Job:
    """A whole API request: what to generate for each prompt, and how to answer."""

    body: Sampling
    answer: Answer
    origin: Origin
    prompts: list[list[int]]
    max_tokens: int | None  # None: as many as the context has room for
    choices: int = 1  # for each prompt
    best_of: int = 1  # of which the choices are taken
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: list[str] | None = None  # each prompt's text, to come first
    grammar: str | None = None
    tools: Tools | None = None


class GenerationService:
    """Answers completion and chat requests of one model."""

    def __init__(
        self, settings: Settings, fleet: FleetClient, engines: Any, metrics: IngressMetrics
    ) -> None:
        directory = settings.model.directory
        self.config = ModelConfig.from_directory(directory)
        self.tokenizer = Tokenizer.from_directory(directory, self.config)
        fim = settings.model.fills_in_the_middle(self.config)
        self.prompts = Prompts(self.tokenizer, self._context, fim)
        self._settings = settings
        self._fleet = fleet
        self._engines = Engines(fleet, engines, metrics, settings.ingress)
        self._rules = SamplingRules(directory, self.config, settings.ingress.max_logprobs)
        self._restrictions = Restrictions(directory)

    async def completions(self, body: CompletionRequest, origin: Origin) -> Response:
        answer = CompletionAnswer(
            origin.request_id,
            self.check_model(body.model),
            self.tokenizer,
            logprobs=body.logprobs is not None,
            include_usage=body.include_usage,
            return_token_ids=bool(body.return_token_ids),
        )
        prompts, choices = body.prompts, body.n or 1
        best_of = body.best_of or choices
        self._check_choices(len(prompts) * best_of)
        if body.suffix is None:
            encoded = [await self.prompts.completion(prompt) for prompt in prompts]
        else:
            encoded = [await self.prompts.middle(prompt, body.suffix) for prompt in prompts]
        ranks = best_of > choices and body.logprobs is None
        answer.prompts = encoded
        job = _Job(
            body,
            answer,
            origin,
            encoded,
            body.output_limit,
            choices,
            best_of,
            logprobs=0 if ranks else body.logprobs,
            prompt_logprobs=self._prompt_logprobs(body),
            echo=[self._written(prompt) for prompt in prompts] if body.echo else None,
            grammar=await self._restrictions.grammar(body),
        )
        return await self._respond(job)

    async def chat(
        self, body: ChatRequest, origin: Origin, answer: Answer | None = None
    ) -> Response:
        """Answers in the shape of `answer`; None: OpenAI's chat completions."""
        model = self.check_model(body.model)
        self._check_choices(body.n or 1)
        tools = Tools.of(body)
        prompt = await self.chat_prompt(body)
        if answer is None:
            answer = ChatAnswer(
                origin.request_id,
                model,
                self.tokenizer,
                logprobs=bool(body.logprobs),
                include_usage=body.include_usage,
                return_token_ids=bool(body.return_token_ids),
            )
        answer.prompts = [prompt]
        job = _Job(
            body,
            answer,
            origin,
            [prompt],
            body.output_limit,
            body.n or 1,
            body.n or 1,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await self._restrictions.grammar(body, tools),
            tools=tools,
        )
        return await self._respond(job)

    async def chat_prompt(self, body: ChatRequest) -> list[int]:
        """Token ids of a conversation, tools and all."""
        turns = conversation(body.messages, Tools.of(body))
        return await self.prompts.chat(turns, bool(body.continue_final_message))

    def close(self) -> None:
        self.prompts.close()
        self._restrictions.close()

    def _context(self) -> int:
        """Longest prompt + output; what the model allows while no engine has told its own."""
        return self._fleet.max_request_tokens or self.config.max_position_embeddings

    def check_model(self, name: str) -> str:
        """The name, if this server has a model of that name.

        Raises:
            ApiError: 404.
        """
        served = self._settings.model.served_name
        if name != served:
            message = f"The model does not exist; this server has '{served}'."
            raise ApiError(404, message, "model", "model_not_found")
        return served

    def _check_choices(self, count: int) -> None:
        limit = self._settings.ingress.max_choices
        if not 1 <= count <= limit:
            raise ApiError(400, f"A request may ask for 1 to {limit} generations.", "n")

    def _prompt_logprobs(self, body: CompletionRequest) -> int | None:
        """With nothing to generate, the prompt is scored even if nobody asked how likely it was."""
        if not body.echo or (body.logprobs is None and body.output_limit):
            return None
        return body.logprobs or 0

    def _written(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def _generations(self, job: _Job) -> list[Choice]:
        """One for each prompt and choice, prompt by prompt."""
        body = job.body
        choices: list[Choice] = []
        seed = body.seed if body.seed is not None else secrets.randbits(62)
        bad_words = await self.prompts.words(body.bad_words or ())
        sampling = self._rules.params(
            body, seed, job.logprobs, job.prompt_logprobs, job.grammar, bad_words
        )
        stops, min_tokens = body.stop_strings, body.min_tokens or 0
        longest = await self._fleet.longest_request(self._settings.router.queue_timeout_s)
        for place, prompt in enumerate(job.prompts):
            limit = _output_limit(longest, len(prompt), job.max_tokens)
            for candidate in range(job.best_of):
                request = Request(
                    id=f"{job.origin.request_id}-{len(choices)}",
                    prompt=prompt,
                    max_tokens=limit,
                    sampling=replace(sampling, seed=seed + candidate),
                    stop_token_ids=self._rules.ends(body),
                    tenant=job.origin.tenant,
                    priority=body.priority or 0,
                    cache_salt=body.cache_salt or "",
                )
                generation = Generation(
                    request,
                    TextStream(self.tokenizer, stops, min_tokens),
                    None if job.echo is None else job.echo[place],
                    self._engines,
                    self.tokenizer,
                    self._settings.router.queue_timeout_s,
                )
                refine = None if job.tools is None else job.tools.parser().push
                choices.append(Choice(generation, refine))
        return choices

    async def _respond(self, job: _Job) -> Response:
        """Leases come first, so that a full server can still answer with a status."""
        async with AsyncExitStack() as stack:
            choices = await self._generations(job)
            for choice in choices:
                await stack.enter_async_context(choice.generation)
            if job.body.stream:
                keep_alive_s = self._settings.ingress.keep_alive_s
                return EventStream(self._events(job, choices), stack.pop_all(), keep_alive_s)
            candidates = await asyncio.gather(*(choice.whole() for choice in choices))
        best = _best(candidates, job.best_of, job.choices)
        answer = partial(_whole, job.answer, best, _usage(job, choices))
        if sum(len(choice.tokens) for choice in best) > _INLINE_TOKENS:
            return await asyncio.to_thread(answer)
        return answer()

    async def _events(self, job: _Job, choices: list[Choice]) -> AsyncGenerator[bytes]:
        answer = job.answer
        try:
            for each in answer.opening(len(choices)):
                yield each
            async for delta in merged(choices):
                if delta.empty and not answer.tells_tokens:
                    continue  # half a character, or held back for a stop string
                for each in answer.piece(delta.choice, delta):
                    yield each
            for each in answer.closing(_usage(job, choices)):
                yield each
        except ApiError as error:
            for each in answer.failure(error):
                yield each
        except Exception:
            for each in answer.failure(server_fault()):
                yield each
            raise


def _output_limit(longest: int, prompt: int, wanted: int | None) -> int:
    """How many tokens may be generated after a prompt of this length.

    Args:
        longest: prompt and output that an engine can hold.

    Raises:
        ApiError: 400, there is no room for what is wanted.
    """
    room = longest - prompt
    needed = 1 if wanted is None else wanted
    if room < needed:
        message = (
            f"This model's maximum context length is {longest} tokens, but the request needs "
            f"{prompt + needed} ({prompt} in the prompt, {needed} to generate)."
        )
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return room if wanted is None else wanted


def _whole(answer: Answer, choices: Sequence[Delta], usage: Usage) -> Response:
    return JsonResponse(answer.whole(choices, usage))


def _best(candidates: Sequence[Delta], of: int, count: int) -> list[Delta]:
    """The `count` likeliest of every `of` candidates, each prompt's own."""
    best: list[Delta] = []
    for first in range(0, len(candidates), of):
        part = list(candidates[first : first + of])
        if count < of:
            part.sort(key=lambda candidate: candidate.mean_logprob, reverse=True)
        best += part[:count]
    return best


def _usage(job: _Job, choices: Sequence[Choice]) -> Usage:
    """Of a whole request: each prompt counts once, every candidate's tokens count."""
    stats = [choice.generation.stats for choice in choices]
    prompts = stats[:: job.best_of]
    return Usage(
        prompt_tokens=sum(first.prompt_tokens for first in prompts),
        cached_tokens=sum(first.cached_tokens for first in prompts),
        completion_tokens=sum(each.generated_tokens for each in stats),
    )
