"""What a caller may ask of the step from logits to a token. Plain data: no tensors here."""

from dataclasses import dataclass

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence picks its tokens.

    A token is a pure function of the logits, of these parameters and of (`seed`, position of
    the token in the sequence), so it depends neither on who shares the batch nor on how often
    the sequence was preempted or moved.

    Penalties and bias come first, in the order of OpenAI's and Hugging Face's definitions
    (repetition over prompt and output; presence and frequency over output only; bias last);
    then what is forbidden (`min_tokens`, `allowed_token_ids`, `bad_words`, `grammar`); then
    temperature; then top-k, top-p and min-p on the resulting probabilities.
    """

    temperature: float = 1.0  # 0 picks the arg-max
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0  # until so many are generated, `end_token_ids` are forbidden
    end_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # empty allows all
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that the output may not hold
    grammar: str | None = None  # what the whole output must be, as llguidance writes it
    logprobs: int | None = None  # None: not wanted; n: the token's own and the n most likely
    prompt_logprobs: int | None = None  # likewise, of every prompt token but the first

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def restricted(self) -> bool:
        """Whether some tokens may be forbidden, those that a grammar forbids aside."""
        return bool(self.min_tokens or self.allowed_token_ids or self.bad_words)

    @property
    def penalized(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )
