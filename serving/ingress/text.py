"""From tokens to what the client may see: whole characters, and nothing past a stop string."""

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for the first of several strings to be complete.

    Text that could still become the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has been met (which is not shown)."""
        if not self._stops:
            return text, False
        self._held += text
        places = [(self._held.find(stop), len(stop)) for stop in self._stops]
        found = [(at + length, at) for at, length in places if at >= 0]
        if found:
            _, at = min(found)
            shown, self._held = self._held[:at], ""
            return shown, True
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
