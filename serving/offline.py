"""Generation from a script, without a server: the same engine and gang, on this machine.

from serving.offline import LLM, SamplingParams

with LLM("nano") as llm:
    for output in llm.generate(["def add(a, b):"], SamplingParams(max_tokens=32)):
        print(output.outputs[0].text)
"""

import asyncio
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from model.config import ModelConfig
from model.sampling_params import SamplingParams as EngineSampling
from model.tokenizer import Tokenizer
from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.errors import ApiError
from serving.api.sampling import Sampling
from serving.config import Settings
from serving.engine.request import Request, TokenOutput
from serving.ingress.prompts import Prompts
from serving.ingress.restrictions import Restrictions
from serving.ingress.sampling import SamplingRules
from serving.ingress.text import TextStream
from serving.ingress.tools import Tools, conversation
from serving.local_engine import LocalEngine, local_engine
from serving.outputs import CompletionOutput, RequestOutput, gathered

Result = TypeVar("Result")
Prompt = str | list[int]
_EVERYTHING = 1 << 20  # logprobs: as many as are asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to generate; None takes the checkpoint's default. Meaning and bounds as in the API."""

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the context has room for
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None  # one of json, regex, choice, grammar, …
    priority: int = 0

    def fields(self) -> dict[str, Any]:
        """Those that the two request types share."""
        own = {"max_tokens", "logprobs", "prompt_logprobs"}
        return {name: value for name, value in asdict(self).items() if name not in own}


class LLM:
    """A model on this machine, ready when the constructor returns.

    Args:
        model: a checkpoint's folder, or `nano`.
        stages: pipeline stages.
        expert_parallel: ranks per stage.
        dtype: of weights and cache.
        settings: further parts of the settings tree, such as {"gang": {"threads": 2}}.

    Raises:
        GangStartError: the ranks could not be started.
        CheckpointError: not a checkpoint that this code can read.
    """

    def __init__(
        self,
        model: str = "nano",
        *,
        stages: int = 1,
        expert_parallel: int = 1,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        tree = {section: dict(values) for section, values in (settings or {}).items()}
        tree.setdefault("telemetry", {}).setdefault("log_level", "WARNING")
        tree.setdefault("model", {}).update(path=model, dtype=dtype, max_model_len=max_model_len)
        tree.setdefault("gang", {}).update(stages=stages, expert_parallel=expert_parallel)
        self._settings = Settings.model_validate(tree)
        directory = self._settings.model.directory
        self.config = ModelConfig.from_directory(directory)
        self.tokenizer = Tokenizer.from_directory(directory, self.config)
        fim = self._settings.model.fills_in_the_middle(self.config)
        self._prompts = Prompts(self.tokenizer, lambda: self._context, fim)
        self._rules = SamplingRules(directory, self.config, _EVERYTHING)
        self._restrictions = Restrictions(directory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._running = AsyncExitStack()
        try:
            self._engine: LocalEngine = self._wait(self._start())
        except BaseException:
            self.close()
            raise
        self._context = self._engine.scheduler.limits.max_request_tokens

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        suffixes: Sequence[str] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt (text, or token ids), all of them in one batch.

        Args:
            suffixes: one a prompt, to fill in the middle between the two.

        Raises:
            ValueError: a parameter or a prompt that cannot be used.
            GenerationFailed: the engine gave a request up.
        """
        params = sampling_params or SamplingParams()
        single = isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int))
        several: Sequence[Any] = [prompts] if single else prompts
        fields = {"model": "", "prompt": "", **params.fields()}
        body = _validated(CompletionRequest, fields)

        async def encode(place: int) -> list[int]:
            if suffixes is None:
                return await self._prompts.completion(several[place])
            return await self._prompts.middle(several[place], suffixes[place])

        written = [prompt if isinstance(prompt, str) else None for prompt in several]
        return self._wait(self._run(body, params, written, encode, None, progress))

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several; messages as in the API.

        Raises:
            ValueError: a parameter or a message that cannot be used.
            GenerationFailed: the engine gave a request up.
        """
        params = sampling_params or SamplingParams()
        single = bool(messages) and isinstance(messages[0], dict)
        talks: Sequence[Any] = [messages] if single else messages
        shared = {"model": "", "tools": tools, "tool_choice": tool_choice, **params.fields()}
        bodies = [_validated(ChatRequest, {**shared, "messages": list(talk)}) for talk in talks]

        async def encode(place: int) -> list[int]:
            body = bodies[place]
            return await self._prompts.chat(conversation(body.messages, Tools.of(body)))

        if not bodies:
            return []
        written = [None] * len(bodies)
        use = Tools.of(bodies[0])
        return self._wait(self._run(bodies[0], params, written, encode, use, progress))

    def close(self) -> None:
        """Ends the ranks; the object is of no use after that."""
        if self._loop.is_closed():
            return
        self._wait(self._running.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._prompts.close()
        self._restrictions.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs on the engine's loop; an interrupt cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _start(self) -> LocalEngine:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return await self._running.enter_async_context(local_engine(self._settings, device))

    async def _run(
        self,
        body: Sampling,
        params: SamplingParams,
        written: Sequence[str | None],
        encode: Callable[[int], Coroutine[Any, Any, list[int]]],
        tools: Tools | None,
        progress: bool,
    ) -> list[RequestOutput]:
        """Every choice of every prompt at once; the engine queues what does not fit."""
        try:
            sampling = self._rules.params(
                body,
                body.seed if body.seed is not None else secrets.randbits(62),
                params.logprobs,
                params.prompt_logprobs,
                await self._restrictions.grammar(body, tools),
                await self._prompts.words(body.bad_words or ()),
            )
            requests = [
                self._requests(body, params, await encode(place), sampling)
                for place in range(len(written))
            ]
        except ApiError as error:
            raise ValueError(error.message) from None
        with _bar(sum(map(len, requests)), progress) as advance:
            work = [
                self._choice(request, body, tools, index, advance)
                for of_prompt in requests
                for index, request in enumerate(of_prompt)
            ]
            done = await asyncio.gather(*work)
        outputs = []
        for place, of_prompt in enumerate(requests):
            first = place * params.n
            prompt = of_prompt[0].prompt
            mine = done[first : first + params.n]
            scored = mine[0][1] if params.prompt_logprobs is not None else None
            choices = [choice for choice, _ in mine]
            outputs.append(RequestOutput(written[place], prompt, choices, scored))
        return outputs

    def _requests(
        self, body: Sampling, params: SamplingParams, prompt: list[int], sampling: EngineSampling
    ) -> list[Request]:
        room = self._context - len(prompt)
        limit = room if params.max_tokens is None else params.max_tokens
        if not 0 < limit <= room:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves room for {room}, not for {limit}"
            )
        return [
            Request(
                id=secrets.token_hex(8),
                prompt=prompt,
                max_tokens=limit,
                sampling=replace(
                    sampling,
                    seed=sampling.seed + index,
                    # The prompt is the same for all choices: one of them scores it.
                    prompt_logprobs=None if index else sampling.prompt_logprobs,
                ),
                stop_token_ids=self._rules.ends(body),
                priority=params.priority,
            )
            for index in range(params.n)
        ]

    async def _choice(
        self,
        request: Request,
        body: Sampling,
        tools: Tools | None,
        index: int,
        advance: Callable[[], None],
    ) -> tuple[CompletionOutput, list[TokenOutput]]:
        """One choice, and its prompt's tokens as far as they were scored."""
        text = TextStream(self.tokenizer, body.stop_strings, body.min_tokens or 0)
        parse = tools.parser().push if tools is not None else None
        done = await gathered(request, index, self._engine.stream(request), text, parse)
        advance()
        return done


def _validated(shape: type[Result], fields: dict[str, Any]) -> Result:
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return shape.model_validate(given)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar in the terminal; the function that it gives advances it by one."""
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not shown, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
