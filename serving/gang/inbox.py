"""What a rank's engine says, in order; a word to gather makes all that came before it void."""

import os
import queue
import threading
from typing import Protocol

from serving.engine.plan import RankPlan
from serving.gang.messages import FormGang, Gather
from serving.wire import BlockingChannel, WireError

Order = RankPlan | Gather | FormGang


class Abortable(Protocol):
    """Something that a rank may hang in."""

    def abort(self) -> None:
        """Lets it fail; called from another thread."""
        ...


class Inbox:
    """Reads on a thread of its own, since the rank's may hang in a group whose peer is gone.

    The thread frees it on a word to gather, and ends the process with the connection.
    """

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._orders: queue.SimpleQueue[tuple[int, Order]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._generation = -1
        self._abortable: Abortable | None = None
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def get(self) -> Order:
        """The next order of the newest generation."""
        while True:
            generation, order = self._orders.get()
            if generation == self._generation:
                return order

    def abort_with(self, generation: int, abortable: Abortable) -> None:
        """What to abort when a newer generation gathers: at once, if it has."""
        with self._lock:
            self._abortable = abortable
            if generation != self._generation:
                abortable.abort()

    def _listen(self) -> None:
        try:
            while True:
                order = self._channel.receive()
                if isinstance(order, Gather):
                    self._begin(order.generation)
                self._orders.put((self._generation, order))
        except WireError:
            os._exit(0)

    def _begin(self, generation: int) -> None:
        with self._lock:
            self._generation = generation
            if self._abortable is not None:
                self._abortable.abort()
                self._abortable = None
