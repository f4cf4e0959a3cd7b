"""Does a figure grow, or only go up and down?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_WARM_UP = 0.25  # of the samples, the first ones: caches fill, allocators find their size
_ERRORS = 3.0  # standard errors of a slope
_SHARE = 0.02  # of the mean: less is no growth whatever the noise


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through samples, by least squares.

    Attributes:
        mean: of the samples.
        growth: what the line rises by from its first sample to its last.
        noise: standard error of that growth.
    """

    mean: float
    growth: float
    noise: float

    @property
    def grows(self) -> bool:
        """By more than noise explains, and more than would matter."""
        return self.growth > max(_ERRORS * self.noise, _SHARE * self.mean, 1.0)

    @classmethod
    def of(cls, times: Sequence[float], values: Sequence[float]) -> "Trend":
        """Of samples in the order of their times, warm-up left out; flat if they are too few."""
        skipped = int(len(times) * _WARM_UP)
        times, values = times[skipped:], values[skipped:]
        count = len(times)
        if count < 3:
            return cls(sum(values) / count if count else 0.0, 0.0, 0.0)
        middle, mean = sum(times) / count, sum(values) / count
        spread = sum((t - middle) ** 2 for t in times)
        slope = sum((t - middle) * (v - mean) for t, v in zip(times, values, strict=True)) / spread
        misses = [v - mean - slope * (t - middle) for t, v in zip(times, values, strict=True)]
        error = sqrt(sum(miss**2 for miss in misses) / (count - 2) / spread)
        duration = times[-1] - times[0]
        return cls(mean, slope * duration, error * duration)
