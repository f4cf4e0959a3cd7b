"""The ranks of a gang as their engine knows them: who is here, and how far each has come.

One TCP connection per rank carries everything; when it ends, that rank is lost. The ranks meet
in *generations*: each begins with `Gather`, after which whatever a rank said for an older one
counts no more. On its connection messages keep their order, so a rank's results are those of
the current generation from its `RankReady` on.
"""

import asyncio
from collections.abc import Callable

from serving.engine.loop import GangFailure
from serving.engine.plan import RankResult
from serving.gang.messages import (
    GANG_CODEC,
    FormGang,
    Gather,
    GroupBroken,
    LoadProgress,
    RankFailed,
    RankHello,
    RankOffer,
    RankReady,
)
from serving.telemetry.logs import get_logger
from serving.wire import Channel, ChannelServer, WireError

log = get_logger("gang")
Cell = tuple[int, int]  # stage, rank
Progress = Callable[[int, int], None]


class GangStartError(GangFailure):
    """The gang never came to be. `user_error`: a retry with the same settings is of no use."""

    def __init__(self, message: str, user_error: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error


class Member:
    """One connected rank."""

    def __init__(self, hello: RankHello, channel: Channel) -> None:
        self.hello = hello
        self.channel = channel
        self.offers: dict[str, bytes] | None = None  # for the current generation
        self.ready = False  # in the current generation
        self.loaded = False  # it has its weights
        self.bytes_done = 0
        self.bytes_total = 0


class Members:
    """Takes the ranks' connections, and keeps account of losses.

    Before the gang has `started`, a loss is the end of it; from then on, the gang is only `torn`.

    Args:
        collect: called with every result of the current generation.
    """

    def __init__(
        self, secret: bytes, stages: int, ranks: int, collect: Callable[[RankResult], None]
    ) -> None:
        self._cells = [(stage, rank) for stage in range(stages) for rank in range(ranks)]
        self._collect = collect
        self._server = ChannelServer(secret, GANG_CODEC, self._serve)
        self._news = asyncio.Event()  # one waiter at a time
        self._failure: GangFailure | None = None
        self.launched: set[Cell] = set()  # and not lost since, connected or not
        self.here: dict[Cell, Member] = {}
        self.generation = -1
        self.started = False
        self.torn: str | None = None  # why the current generation can do no more steps
        self.progress: Progress = lambda done, total: None  # of the start

    async def listen(self, host: str) -> int:
        """Opens the port that ranks connect to."""
        return await self._server.start(host)

    async def close(self) -> None:
        self.fail(GangFailure("the gang was stopped"))
        await self._server.close()

    @property
    def missing(self) -> list[Cell]:
        """Cells for which no rank was launched, or whose rank is lost."""
        return [cell for cell in self._cells if cell not in self.launched]

    @property
    def gathered(self) -> bool:
        """All are here and have said what they offer."""
        here = self.here.values()
        return len(here) == len(self._cells) and all(rank.offers is not None for rank in here)

    @property
    def ready(self) -> bool:
        here = self.here.values()
        return len(here) == len(self._cells) and all(rank.ready for rank in here)

    @property
    def silent(self) -> list[Cell]:
        """Ranks that have nothing to do but to gather, and did not yet."""
        return [cell for cell, rank in self.here.items() if rank.loaded and rank.offers is None]

    def gather(self) -> None:
        """Begins a new generation."""
        self.generation += 1
        for rank in self.here.values():
            rank.offers, rank.ready = None, False
        self._tell_all(Gather(self.generation))

    def form(self) -> None:
        """All have gathered: tells everybody everybody's offers."""
        offers: dict[str, bytes] = {}
        for rank in self.here.values():
            offers |= rank.offers or {}
        self.torn = None
        self._tell_all(FormGang(self.generation, offers))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition on the members.

        Raises:
            GangFailure: it will not come to hold, for the gang is at its end.
        """
        while not condition():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()

    def wake(self) -> None:
        """Lets `until` look again."""
        self._news.set()

    def fail(self, failure: GangFailure) -> None:
        """The gang is at its end; the first reason counts."""
        if self._failure is None:
            self._failure = failure
            self.torn = None
            self.wake()

    def lose(self, cell: Cell, reason: str, user_error: bool = False) -> None:
        """A rank has ended or is given up; does nothing if that is known already."""
        if cell not in self.launched:
            return
        self.launched.discard(cell)
        rank = self.here.pop(cell, None)
        if rank is not None:
            rank.channel.abort()
        self.tear(reason, cell_name(cell), user_error)

    def tear(self, reason: str, cell: str = "", user_error: bool = False) -> None:
        """The current generation can do no more steps; `cell` is lost, if one is named."""
        if self._failure is not None:
            return
        if not self.started:
            self.fail(GangStartError(reason, user_error))
        elif user_error:
            self.fail(GangFailure(reason))
        else:
            log.event("WARNING", "gang.broken", reason=reason, cell=cell)
            self.torn = reason
            self.wake()

    def _report_progress(self) -> None:
        here = self.here.values()
        self.progress(sum(rank.bytes_done for rank in here), sum(rank.bytes_total for rank in here))

    def _tell_all(self, message: Gather | FormGang) -> None:
        frame = GANG_CODEC.frame(message)
        for rank in list(self.here.values()):
            try:
                rank.channel.send_frame(frame)
            except WireError:
                continue  # its reader sees the end as well

    async def _serve(self, channel: Channel) -> None:
        hello = await channel.receive()
        if not isinstance(hello, RankHello):
            return
        cell = (hello.stage, hello.rank)
        if cell not in self.launched or cell in self.here:
            return
        rank = self.here[cell] = Member(hello, channel)
        try:
            channel.send(Gather(self.generation))
            while True:
                self._receive(cell, rank, await channel.receive())
        except WireError:
            if self.here.get(cell) is rank:
                self.lose(cell, f"rank {cell_name(cell)} is gone")

    def _receive(self, cell: Cell, rank: Member, message: object) -> None:
        match message:
            case RankResult():
                if rank.ready:
                    self._collect(message)
            case RankOffer(generation=self.generation):
                rank.offers = message.offers
                self.wake()
            case RankReady():
                rank.loaded = True
                rank.ready = message.generation == self.generation
                self.wake()
            case GroupBroken(generation=self.generation):
                self.tear(f"rank {cell_name(cell)}: {message.message}")
            case LoadProgress():
                rank.bytes_done, rank.bytes_total = message.bytes_done, message.bytes_total
                if not self.started:
                    self._report_progress()
            case RankFailed():
                text = message.message
                if not message.user_error:
                    text = f"rank {cell_name(cell)}: {text}"
                self.lose(cell, text, message.user_error)


def cell_name(cell: Cell) -> str:
    return f"{cell[0]}.{cell[1]}"
