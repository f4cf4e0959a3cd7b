"""The engine's side of a gang: launch the ranks, form the group, feed steps, collect results.

One TCP connection per rank carries everything; when it ends, that rank is dead, and the engine
knows at once. The first failure ends the gang: every later call raises `GangFailure`.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from serving.engine.loop import GangFailure
from serving.engine.plan import RankResult, StepPlan, StepResult
from serving.gang.messages import (
    GANG_CODEC,
    FormGang,
    LoadProgress,
    RankFailed,
    RankHello,
    RankReady,
    RankSpec,
)
from serving.wire import Channel, ChannelServer, WireError

Progress = Callable[[int, int], None]


class GangStartError(GangFailure):
    """The gang never came to be. `user_error`: a retry with the same settings is of no use."""

    def __init__(self, message: str, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class Launcher(Protocol):
    """Starts rank processes somewhere; each calls `run_rank(spec, secret)`."""

    async def launch(self, specs: list[RankSpec], secret: bytes) -> None: ...

    async def watch(self) -> str:
        """Waits until a rank has ended by itself; returns one line about it."""
        ...

    async def stop(self) -> None:
        """Ends every rank; returns when they are gone."""
        ...


class _Rank:
    """One connected rank."""

    def __init__(self, hello: RankHello, channel: Channel) -> None:
        self.hello = hello
        self.channel = channel
        self.ready = False
        self.bytes_done = 0
        self.bytes_total = 0


class Gang:
    """A running group of `stages` × `ranks` rank processes; implements the loop's `Gang`."""

    def __init__(self, launcher: Launcher, secret: bytes, stages: int, ranks: int) -> None:
        self._launcher = launcher
        self._secret = secret
        self._size = stages * ranks
        self._columns = ranks
        self._server = ChannelServer(secret, GANG_CODEC, self._serve_rank)
        self._ranks: dict[tuple[int, int], _Rank] = {}
        self._partial: dict[int, list[RankResult]] = {}
        self._results: deque[StepResult] = deque()
        self._failure: GangFailure | None = None
        self._news = asyncio.Event()  # one waiter at a time: `start`, then `result`
        self._progress: Progress = lambda done, total: None

    async def listen(self, host: str) -> int:
        """Opens the port that ranks connect to; its number goes into their specs."""
        return await self._server.start(host)

    async def start(
        self, specs: list[RankSpec], timeout_s: float, progress: Progress | None = None
    ) -> None:
        """Launches the ranks and waits until all have loaded.

        Args:
            progress: called with (bytes read, bytes to read) of the whole gang.

        Raises:
            GangStartError: a rank failed or did not get ready in time; the gang is stopped.
        """
        self._progress = progress or self._progress
        watch = asyncio.create_task(self._watch_launcher())
        try:
            async with asyncio.timeout(timeout_s):
                await self._launcher.launch(specs, self._secret)
                await self._until(lambda: len(self._ranks) == self._size)
                offers: dict[str, bytes] = {}
                for rank in self._ranks.values():
                    offers |= rank.hello.offers
                form = GANG_CODEC.frame(FormGang(0, offers))
                for rank in self._ranks.values():
                    rank.channel.send_frame(form)
                await self._until(lambda: all(rank.ready for rank in self._ranks.values()))
        except TimeoutError as error:
            raise GangStartError(f"ranks were not ready after {timeout_s:g} s") from error
        except (GangFailure, WireError) as error:
            first = self._failure or error
            user_error = isinstance(first, GangStartError) and first.user_error
            raise GangStartError(str(first), user_error) from error
        finally:
            watch.cancel()
            if not all(rank.ready for rank in self._ranks.values()) or not self._ranks:
                await self.stop()

    @property
    def metrics_addresses(self) -> list[str]:
        """Where each rank's own metrics are served."""
        return [self._ranks[key].hello.metrics_address for key in sorted(self._ranks)]

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to every rank: one encoding per column, the same bytes to its stages."""
        frames = [GANG_CODEC.frame(column) for column in plan.columns]
        for (_, column), rank in self._ranks.items():
            try:
                rank.channel.send_frame(frames[column])
            except WireError:
                return  # `result` tells: this connection's reader has seen the end as well

    async def result(self) -> StepResult:
        """The next finished step; steps that finished before a failure come first.

        Raises:
            GangFailure: a rank is gone.
        """
        await self._until(lambda: bool(self._results))
        return self._results.popleft()

    async def stop(self) -> None:
        """Ends the ranks; safe to call twice."""
        self._fail(GangFailure("the gang was stopped"))
        await self._server.close()
        await self._launcher.stop()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()

    async def _watch_launcher(self) -> None:
        self._fail(GangStartError(await self._launcher.watch()))

    async def _serve_rank(self, channel: Channel) -> None:
        hello = await channel.receive()
        key = (hello.stage, hello.rank) if isinstance(hello, RankHello) else None
        if key is None or key in self._ranks:
            return
        rank = self._ranks[key] = _Rank(hello, channel)
        self._news.set()
        try:
            while True:
                self._receive(rank, await channel.receive())
        except WireError:
            self._fail(GangFailure(f"rank {key[0]}.{key[1]} is gone"))

    def _receive(self, rank: _Rank, message: object) -> None:
        match message:
            case RankResult():
                self._collect(message)
            case LoadProgress():
                rank.bytes_done, rank.bytes_total = message.bytes_done, message.bytes_total
                self._report_progress()
            case RankReady():
                rank.ready = True
                self._news.set()
            case RankFailed():
                text = f"rank {message.stage}.{message.rank}: {message.message}"
                if message.user_error:
                    text = message.message
                error = GangFailure(text)
                if not all(rank.ready for rank in self._ranks.values()):
                    error = GangStartError(text, message.user_error)
                self._fail(error)

    def _collect(self, result: RankResult) -> None:
        parts = self._partial.setdefault(result.step, [])
        parts.append(result)
        if len(parts) == self._size:
            del self._partial[result.step]
            self._results.append(StepResult(result.step, parts))
            self._news.set()

    def _report_progress(self) -> None:
        done = sum(rank.bytes_done for rank in self._ranks.values())
        self._progress(done, sum(rank.bytes_total for rank in self._ranks.values()))

    def _fail(self, error: GangFailure) -> None:
        if self._failure is None:
            self._failure = error
            self._news.set()
