"""This project's engine without HTTP and Ray, as `expertline bench` runs it. Job on stdin.

Not `expertline bench` itself: the prompts and the clock are to be everybody's.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

from loadtest.peers.timing import Prompts, measure, read_job, tell
from model.sampling_params import SamplingParams
from serving.config import Settings
from serving.engine.request import Request
from serving.local_engine import local_engine

STEP_TOKENS = 2048  # vLLM takes 4096 of itself; more rows a step are nearer to the CPU's peak
CACHE_TOKENS = 16384  # of each column of ranks: the whole batch with room to spare


def settings_tree(model: str, stages: int, ranks: int, threads: int) -> dict[str, Any]:
    """Settings of a comparison: bf16, `threads` for each rank, nothing remembered."""
    return {
        "model": {"path": model, "dtype": "bfloat16"},
        "gang": {
            "stages": stages,
            "expert_parallel": ranks,
            "threads": threads,
            "cache_tokens": CACHE_TOKENS,
        },
        "engine": {"prefix_cache": False, "max_step_tokens": STEP_TOKENS},
        "telemetry": {"log_level": "WARNING"},
    }


def main() -> None:
    """Measures the job of the standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--quantize")
    layout = parser.parse_args()
    job = read_job()
    tree = settings_tree(job["model"], layout.stages, layout.expert_parallel, job["threads"])
    tree["model"]["quantize"] = layout.quantize
    names = count()
    with asyncio.Runner() as runner:
        running = AsyncExitStack()
        engine = runner.run(
            running.enter_async_context(local_engine(Settings.model_validate(tree)))
        )

        def generate(prompts: Prompts, new: int) -> int:
            greedy = SamplingParams(temperature=0.0)
            requests = [
                Request(id=f"r{next(names)}", prompt=prompt, max_tokens=new, sampling=greedy)
                for prompt in prompts
            ]

            async def run() -> int:
                return sum(len(c.tokens) for c in await engine.generate(requests))

            return runner.run(run())

        try:
            runs = measure(generate, job)
        finally:
            runner.run(running.aclose())
    tell(runs)


if __name__ == "__main__":  # its ranks import this file again
    main()
