"""From tokens to what the client may see: whole characters, and nothing past a stop string."""

from collections.abc import Sequence

from model.tokenizer import Detokenizer, Tokenizer
from serving.api.delta import Delta
from serving.engine.request import FinishReason, TokenOutput


class StopStrings:
    """Watches a growing text for the first of several strings to be complete.

    Text that could still become the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.met: str | None = None
        self.rest = ""  # what came after it
        self._stops = list(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has been met (which is not shown)."""
        if not self._stops:
            return text, False
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stops]
        found = [(at + len(stop), at, stop) for at, stop in places if at >= 0]
        if found:
            _, at, self.met = min(found)
            shown, self.rest = self._held[:at], self._held[at + len(self.met) :]
            self._held = ""
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


class TextStream:
    """One generation's tokens as they become text.

    Args:
        stops: strings that end it; they are not shown.
        min_tokens: before so many tokens no string ends it.

    Attributes:
        stopped: a stop string was met; whoever generates does not know yet.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], min_tokens: int = 0) -> None:
        self.stopped = False
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._characters = 0  # of text so far, shown or not

    def prompt(self, text: str, tokens: Sequence[TokenOutput], tokenizer: Tokenizer) -> Delta:
        """A prompt that the client wants in front of its answer."""
        delta = Delta(text, list(tokens), prompt_tokens=len(tokens))
        detokenizer = Detokenizer(tokenizer)
        for output in tokens:
            delta.offsets.append(self._characters)
            self._characters += len(detokenizer.push(output.token))
        self._characters = len(text)
        return delta

    def push(self, tokens: Sequence[TokenOutput]) -> Delta:
        """What these tokens add; none is looked at after the one that ends the text."""
        delta = Delta()
        for output in tokens:
            self._tokens += 1
            # The token that ends a text is not part of it.
            ending = output.finish is FinishReason.STOP
            text = "" if ending else self._detokenizer.push(output.token)
            delta.tokens.append(output)
            delta.offsets.append(self._characters)
            self._characters += len(text)
            self._show(text, delta)
            if self.stopped:
                break
            if output.finish is not None:
                self._show(self._detokenizer.flush(), delta)
                if not self.stopped:
                    delta.text += self._stops.flush()
                    delta.finish_reason = str(output.finish)
        return delta

    def _show(self, text: str, delta: Delta) -> None:
        if self._tokens <= self._min_tokens:
            delta.text += text
            return
        shown, self.stopped = self._stops.push(text)
        delta.text += shown
        if self.stopped:
            delta.finish_reason = "stop"
            delta.stop_string = self._stops.met
