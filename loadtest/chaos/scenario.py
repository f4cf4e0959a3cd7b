"""What a scenario is."""

from abc import ABC, abstractmethod
from typing import ClassVar

from loadtest.chaos.arena import Arena
from loadtest.chaos.nodes import why_not
from loadtest.chaos.server import Layout


class Scenario(ABC):
    """One way in which a server is hurt, and what is measured of it."""

    name: ClassVar[str]
    layout: ClassVar[Layout]
    share: ClassVar[float] = 0.4  # of the server's tokens in a second
    faults: ClassVar[int] = 10
    quick_faults: ClassVar[int] = 2
    quick_layout: ClassVar[Layout | None] = None  # the same, if it is as good for a quick look

    def laid_out(self, quick: bool) -> Layout:
        """How its server is cut."""
        return self.quick_layout or self.layout if quick else self.layout

    def refusal(self) -> str | None:
        """Why it cannot be run on this machine; None if it can."""
        return None

    @abstractmethod
    async def play(self, arena: Arena) -> None:
        """Runs it to its end; what is found is in the arena's outcome.

        Raises:
            ChaosError: it could not go on.
        """


class NodeScenario(Scenario):
    """One on several nodes."""

    def refusal(self) -> str | None:
        return why_not()
