"""The clock of the offline figures: the same lines run beside every engine.

Only the standard library: the other environments have nothing else in common.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], int]  # prompts, tokens for each → tokens that came, in all


def read_job() -> dict[str, Any]:
    """What to measure, as `Plan.job` wrote it."""
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def measure(generate: Generate, job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each batch size: seconds until all first tokens, and seconds until all tokens.

    Two runs from nothing, one of a single token and one of all. An engine that starts decoding
    some requests while it still reads others has its whole run counted, like any other.
    """
    found = []
    for size in job["batches"]:
        prompts = job["prompts"][:size]
        seconds = {}
        generate(prompts, 2)  # warm-up: allocators, and whatever compiles by shape
        for name, new in (("first_s", 1), ("all_s", 1 + job["output"])):
            started = time.perf_counter()
            came = generate(prompts, new)
            seconds[name] = time.perf_counter() - started
            if came != size * new:
                raise SystemExit(f"{came} tokens came instead of {size * new}")
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        counts = {"batch": size, "prompt_tokens": prompt_tokens}
        found.append({**counts, "later_tokens": size * job["output"], **seconds})
    return found


def tell(runs: list[dict[str, Any]]) -> None:
    """The one line that the comparison reads."""
    print("\n" + json.dumps({"runs": runs}), flush=True)
