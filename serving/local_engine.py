"""The engine and its gang without Ray, HTTP or Serve: ranks are processes of this machine."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serving.config import Settings
from serving.engine.loop import EngineLoop, EngineObserver
from serving.engine.request import Finish, FinishReason, Output, PromptScores, Request, TokenOutput
from serving.engine.scheduler import Scheduler
from serving.gang.gang import Gang, Progress
from serving.gang.processes import ProcessLauncher
from serving.specs import engine_limits, gang_bounds, rank_specs

_LOOPBACK = "127.0.0.1"


class GenerationFailed(Exception):
    """A request ended without its last token."""


@dataclass(slots=True)
class Completion:
    """What one request gave, and when: seconds of the engine's clock."""

    tokens: list[TokenOutput] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [output.token for output in self.tokens]


class LocalEngine:
    """A running engine; made by `local_engine`."""

    def __init__(self, scheduler: Scheduler, gang: Gang, observer: EngineObserver | None) -> None:
        self.scheduler = scheduler
        self.gang = gang
        self._queues: dict[str, asyncio.Queue[Output]] = {}
        self._loop = EngineLoop(scheduler, gang, self._emit, time.monotonic, observer)
        self.running = asyncio.create_task(self._loop.run(), name="engine-loop")

    async def stream(self, request: Request) -> AsyncIterator[TokenOutput | PromptScores]:
        """The prompt's scores, if asked for, and the request's tokens as they come.

        Leaving early cancels it.

        Raises:
            RequestError: it can never be served.
            GenerationFailed: the engine gave it up.
        """
        queue = self._queues[request.id] = asyncio.Queue()
        ended = False
        try:
            self._loop.submit(request)
            while not ended:
                output = await queue.get()
                if isinstance(output, Finish):
                    ended = True
                    if output.reason is FinishReason.LENGTH:
                        return
                    raise GenerationFailed(output.message)
                ended = output.ends
                yield output
        finally:
            del self._queues[request.id]
            if not ended:
                self._loop.cancel(request.id)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs requests together to their ends."""
        return await asyncio.gather(*(self._complete(request) for request in requests))

    async def _complete(self, request: Request) -> Completion:
        completion = Completion()
        async for output in self.stream(request):
            if isinstance(output, PromptScores):
                completion.scores.append(output)
            else:
                completion.tokens.append(output)
                completion.times.append(time.monotonic())
        return completion

    def _emit(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put_nowait(output)


@asynccontextmanager
async def local_engine(
    settings: Settings,
    device: str = "cpu",
    observer: EngineObserver | None = None,
    progress: Progress | None = None,
    trace: bool = False,
) -> AsyncIterator[LocalEngine]:
    """An engine over rank processes of this machine, for the body of the `with`.

    Args:
        trace: whether the ranks' results tell where each step's time went.

    Raises:
        GangStartError: the ranks could not be started.
    """
    gang_settings = settings.gang
    secret = secrets.token_bytes(32)
    gang = Gang(
        ProcessLauncher(),
        secret,
        gang_settings.stages,
        gang_settings.expert_parallel,
        gang_bounds(settings),
    )
    specs = rank_specs(settings, _LOOPBACK, await gang.listen(_LOOPBACK), device)
    for spec in specs:
        spec.host = _LOOPBACK
        spec.trace = trace
    await gang.start(specs, gang_settings.start_timeout_s, progress)
    engine = LocalEngine(Scheduler(engine_limits(settings)), gang, observer)
    try:
        yield engine
    finally:
        engine.running.cancel()
        await asyncio.gather(engine.running, return_exceptions=True)
        await gang.stop()
