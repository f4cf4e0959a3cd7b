"""From a request's sampling fields, and the checkpoint's defaults, to sampling parameters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.sampling_params import SamplingParams
from serving.api.errors import ApiError
from serving.api.sampling import Sampling


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What applies where a client says nothing: the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def from_directory(cls, directory: Path) -> "SamplingDefaults":
        file = directory / "generation_config.json"
        if not file.is_file():
            return cls()
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.get("do_sample") is False:
            return cls(temperature=0.0)
        return cls(
            temperature=float(raw.get("temperature", 1.0)),
            top_p=float(raw.get("top_p", 1.0)),
            top_k=int(raw.get("top_k") or 0),
            repetition_penalty=float(raw.get("repetition_penalty", 1.0)),
        )


class SamplingRules:
    """Makes sampling parameters for one model.

    Args:
        max_logprobs: how many of a token's alternatives a client may ask for.
    """

    def __init__(self, directory: Path, config: ModelConfig, max_logprobs: int) -> None:
        self._max_logprobs = max_logprobs
        self._defaults = SamplingDefaults.from_directory(directory)
        self._config = config

    def ends(self, body: Sampling) -> frozenset[int]:
        """Tokens that end the text."""
        ends = set(body.stop_token_ids or ())
        if not body.ignore_eos:
            ends.add(self._config.eos_token_id)
        return frozenset(ends)

    def params(
        self,
        body: Sampling,
        seed: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: str | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> SamplingParams:
        """Parameters for one choice.

        Args:
            bad_words: the request's, as tokens.

        Raises:
            ApiError: 400, a token id outside the vocabulary, or too many log-probabilities.
        """
        defaults = self._defaults
        if logprobs is not None and logprobs > self._max_logprobs:
            message = f"At most {self._max_logprobs} logprobs can be asked for."
            raise ApiError(400, message, "logprobs")
        bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
        self._check_ids("logit_bias", [token for token, _ in bias])
        self._check_ids("allowed_token_ids", body.allowed_token_ids or [])
        self._check_ids("stop_token_ids", body.stop_token_ids or [])
        return SamplingParams(
            temperature=_given(body.temperature, defaults.temperature),
            top_k=max(0, _given(body.top_k, defaults.top_k)),
            top_p=_given(body.top_p, defaults.top_p),
            min_p=_given(body.min_p, 0.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
            logit_bias=bias,
            seed=seed,
            min_tokens=body.min_tokens or 0,
            end_token_ids=tuple(sorted(self.ends(body))) if body.min_tokens else (),
            allowed_token_ids=tuple(body.allowed_token_ids or ()),
            bad_words=bad_words,
            grammar=grammar,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _check_ids(self, name: str, ids: list[int]) -> None:
        if ids and max(ids) >= self._config.vocab_size:
            raise ApiError(400, "A token id is outside the vocabulary.", name)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
