"""Is an answer the one that the same request got undisturbed? Token for token.

A request that is greedy, or sampled with a seed, has one answer. It is recorded once while
nothing else happens; any later answer to it can then be told to be right, whatever died in
between. Sequences are compared by their longest common blocks, so that one lost token is one
lost token and not a wrong rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from loadtest.transcript import Choice, Transcript

LOGPROB_TOLERANCE = 1e-3  # fp32: sums in another order, as batches differ


@dataclass(slots=True)
class Verdict:
    """What differs from the undisturbed answer.

    Attributes:
        lost: tokens that should have come and did not.
        added: tokens that came and should not have: doubled ones above all.
        changed: tokens that came instead of others.
        faults: everything else, in words.
    """

    lost: int = 0
    added: int = 0
    changed: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens lost, doubled or different."""
        return self.lost + self.added + self.changed

    @property
    def right(self) -> bool:
        return not self.tokens and not self.faults

    def __str__(self) -> str:
        counts = [
            f"{count} {name}"
            for name in ("lost", "added", "changed")
            if (count := getattr(self, name))
        ]
        return "; ".join([*counts, *self.faults]) or "as undisturbed"


def compare(golden: Transcript, said: Transcript, whole: bool = True) -> Verdict:
    """Judges an answer by the undisturbed one.

    Args:
        golden: all of the undisturbed answer.
        said: what came this time.
        whole: it was read to its end; otherwise it has to be a beginning of the golden one.
    """
    verdict = Verdict()
    for index in sorted(golden.choices.keys() | said.choices.keys()):
        expected = golden.choices.get(index, Choice())
        found = said.choices.get(index, Choice())
        _compare_choices(index, expected, found, whole, verdict)
    if whole:
        _compare_counts(golden, said, verdict)
    return verdict


def _compare_choices(
    index: int, expected: Choice, found: Choice, whole: bool, verdict: Verdict
) -> None:
    tokens = expected.tokens if whole else expected.tokens[: len(found.tokens)]
    _compare_tokens(tokens, found.tokens, verdict)
    if whole and found.finish_reason != expected.finish_reason:
        verdict.faults.append(
            f"choice {index} finished by {found.finish_reason}, not {expected.finish_reason}"
        )
    if tokens != found.tokens:
        return  # text and log-probabilities differ for the same reason
    text = expected.text if whole else expected.text[: len(found.text)]
    if text != found.text:
        verdict.faults.append(f"choice {index} has other text of the same tokens")
    _compare_logprobs(index, expected.logprobs, found.logprobs, whole, verdict)


def _compare_tokens(expected: Sequence[int], found: Sequence[int], verdict: Verdict) -> None:
    if expected == found:
        return
    for tag, a, b, c, d in SequenceMatcher(None, expected, found, autojunk=False).get_opcodes():
        if tag != "equal":
            both = min(b - a, d - c)
            verdict.changed += both
            verdict.lost += b - a - both
            verdict.added += d - c - both


def _compare_logprobs(
    index: int, expected: Sequence[float], found: Sequence[float], whole: bool, verdict: Verdict
) -> None:
    if whole and len(expected) != len(found):
        verdict.faults.append(
            f"choice {index} has {len(found)} log-probabilities instead of {len(expected)}"
        )
    pairs = zip(expected, found, strict=False)
    worst = max((abs(one - other) for one, other in pairs), default=0.0)
    if not worst <= LOGPROB_TOLERANCE:
        verdict.faults.append(f"choice {index}: a log-probability is off by {worst:.2g}")


def _compare_counts(golden: Transcript, said: Transcript, verdict: Verdict) -> None:
    if said.output_tokens != said.received:
        verdict.faults.append(f"usage says {said.output_tokens} tokens, {said.received} came")
    if said.prompt_tokens != golden.prompt_tokens:
        verdict.faults.append(
            f"usage says {said.prompt_tokens} prompt tokens, not {golden.prompt_tokens}"
        )
