"""From a validated API request to generations, and from generations to an answer."""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from serving.api.answers import Answer, ChatAnswer, CompletionAnswer, Delta, usage
from serving.api.errors import ApiError, server_fault
from serving.api.sse import DONE, error_event, event
from serving.api.types import ChatRequest, CompletionRequest, Sampling
from serving.config import Settings
from serving.engine.request import Request
from serving.ingress.fleet import FleetClient
from serving.ingress.generation import Generation
from serving.ingress.prompts import Prompts
from serving.telemetry.metrics import IngressMetrics

_COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's own default for /v1/completions


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies where a client says nothing: the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def from_directory(cls, directory: Path) -> "SamplingDefaults":
        file = directory / "generation_config.json"
        if not file.is_file():
            return cls()
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.get("do_sample") is False:
            return cls(temperature=0.0)
        return cls(
            temperature=float(raw.get("temperature", 1.0)),
            top_p=float(raw.get("top_p", 1.0)),
            top_k=int(raw.get("top_k") or 0),
            repetition_penalty=float(raw.get("repetition_penalty", 1.0)),
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """A whole API request: its choices in order, and how to answer."""

    generations: list[Generation]
    per_prompt: int
    answer: Answer
    logprobs: bool
    stream: bool
    include_usage: bool


class EventStream(StreamingResponse):
    """A stream of events that owns what it streams from, even if it is never read."""

    def __init__(self, events: AsyncGenerator[bytes], owned: AsyncExitStack) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.owned = owned
        self.owned.push_async_callback(events.aclose)
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            async with self.owned:
                await super().__call__(scope, receive, send)
                if not self._complete:
                    raise ClientDisconnect

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._complete = True


class GenerationService:
    """Answers completion and chat requests of one model."""

    def __init__(
        self, settings: Settings, fleet: FleetClient, engines: Any, metrics: IngressMetrics
    ) -> None:
        directory = settings.model.directory
        self.config = ModelConfig.from_directory(directory)
        self.tokenizer = Tokenizer.from_directory(directory, self.config)
        self._settings = settings
        self._fleet = fleet
        self._engines = engines
        self._metrics = metrics
        self._defaults = SamplingDefaults.from_directory(directory)
        self._prompts = Prompts(self.tokenizer, self.config.max_position_embeddings)

    async def completions(self, body: CompletionRequest, tenant: str, request_id: str) -> Response:
        prompts = body.prompts
        answer = CompletionAnswer(request_id, self._model(body.model), self.tokenizer)
        self._check_choices(len(prompts) * (body.n or 1))
        encoded = [await self._prompts.completion(prompt) for prompt in prompts]
        max_tokens = body.max_tokens or _COMPLETION_DEFAULT_TOKENS
        job = self._job(body, answer, encoded, max_tokens, body.logprobs, tenant, request_id)
        return await self._respond(job)

    async def chat(self, body: ChatRequest, tenant: str, request_id: str) -> Response:
        answer = ChatAnswer(request_id, self._model(body.model), self.tokenizer)
        self._check_choices(body.n or 1)
        prompt = await self._prompts.chat(body.messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        job = self._job(body, answer, [prompt], max_tokens, logprobs, tenant, request_id)
        return await self._respond(job)

    def close(self) -> None:
        self._prompts.close()

    def _model(self, name: str) -> str:
        served = self._settings.model.served_name
        if name != served:
            message = f"The model does not exist; this server has '{served}'."
            raise ApiError(404, message, "model", "model_not_found")
        return served

    def _check_choices(self, count: int) -> None:
        limit = self._settings.ingress.max_choices
        if not 1 <= count <= limit:
            raise ApiError(400, f"A request may ask for 1 to {limit} generations.", "n")

    def _job(
        self,
        body: Sampling,
        answer: Answer,
        prompts: list[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
        tenant: str,
        request_id: str,
    ) -> _Job:
        choices = body.n or 1
        seed = body.seed if body.seed is not None else secrets.randbits(62)
        generations: list[Generation] = []
        for prompt in prompts:
            limit = self._output_limit(len(prompt), max_tokens)
            for _ in range(choices):
                index = len(generations)
                request = Request(
                    id=f"{request_id}-{index}",
                    prompt=prompt,
                    max_tokens=limit,
                    sampling=self._sampling(body, seed + index % choices, logprobs),
                    stop_token_ids=self._stop_ids(body),
                    tenant=tenant,
                    priority=body.priority,
                )
                generations.append(
                    Generation(
                        request,
                        body.stop_strings,
                        self._fleet,
                        self._engines,
                        self.tokenizer,
                        self._metrics,
                        self._settings.router.queue_timeout_s,
                    )
                )
        wanted = logprobs is not None
        return _Job(generations, choices, answer, wanted, bool(body.stream), body.include_usage)

    def _output_limit(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may be generated after a prompt of this length."""
        limit = self._fleet.max_request_tokens
        if limit is None:
            raise ApiError(503, "No engine is ready to serve the model yet.", retry_after_s=2)
        room = limit - prompt
        if room < 1 or (wanted is not None and wanted > room):
            message = (
                f"This model's maximum context length is {limit} tokens, but the request needs "
                f"{prompt + (wanted or 1)} ({prompt} in the prompt, {wanted or 1} to generate)."
            )
            raise ApiError(400, message, "max_tokens", "context_length_exceeded")
        return wanted or room

    def _sampling(self, body: Sampling, seed: int, logprobs: int | None) -> SamplingParams:
        defaults = self._defaults
        most = self._settings.ingress.max_logprobs
        if logprobs is not None and logprobs > most:
            raise ApiError(400, f"At most {most} logprobs can be asked for.", "logprobs")
        bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
        if any(token >= self.config.vocab_size for token, _ in bias):
            raise ApiError(400, "A token id is outside the vocabulary.", "logit_bias")

        return SamplingParams(
            temperature=_given(body.temperature, defaults.temperature),
            top_k=max(0, _given(body.top_k, defaults.top_k)),
            top_p=_given(body.top_p, defaults.top_p),
            min_p=_given(body.min_p, 0.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
            logit_bias=bias,
            seed=seed,
            logprobs=logprobs,
        )

    def _stop_ids(self, body: Sampling) -> frozenset[int]:
        ends = set(body.stop_token_ids or ())
        if not body.ignore_eos:
            ends.add(self.config.eos_token_id)
        return frozenset(ends)

    async def _respond(self, job: _Job) -> Response:
        """Leases come first, so that a full server can still answer with a status."""
        async with AsyncExitStack() as stack:
            for generation in job.generations:
                await stack.enter_async_context(generation)
            if job.stream:
                return EventStream(self._events(job), stack.pop_all())
            whole = await asyncio.gather(*(_collect(g) for g in job.generations))
        choices = []
        for index, delta in enumerate(whole):
            logprobs = job.answer.logprobs(delta) if job.logprobs else None
            choices.append(job.answer.choice(index, delta, logprobs))
        return JSONResponse(job.answer.whole(choices, _usage(job)))

    async def _events(self, job: _Job) -> AsyncGenerator[bytes]:
        try:
            for index in range(len(job.generations)):
                if opening := job.answer.opening(index):
                    yield event(job.answer.chunk(opening))
            async for index, delta in _merged(job.generations):
                if not (delta.text or delta.finish_reason or job.logprobs):
                    continue  # half a character, or held back for a stop string
                logprobs = job.answer.logprobs(delta) if job.logprobs else None
                yield event(job.answer.chunk([job.answer.piece(index, delta, logprobs)]))
            if job.include_usage:
                yield event(job.answer.chunk([], _usage(job)))
            yield DONE
        except ApiError as error:
            yield error_event(error)
        except Exception:
            yield error_event(server_fault())
            raise


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _usage(job: _Job) -> dict[str, Any]:
    return usage([generation.stats for generation in job.generations], job.per_prompt)


async def _collect(generation: Generation) -> Delta:
    whole = Delta()
    async for delta in generation.deltas():
        whole.add(delta)
    return whole


async def _merged(generations: list[Generation]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several choices as they come, each with the choice's index."""
    if len(generations) == 1:
        async for delta in generations[0].deltas():
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for delta in generation.deltas():
                arrived.put_nowait((index, delta))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    pumps = [asyncio.create_task(pump(i, g)) for i, g in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
