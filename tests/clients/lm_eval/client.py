"""lm-eval: every score over HTTP equals the one of its own Hugging Face backend.

The same tasks on the same checkpoint in fp32, once by `local-completions` and once by `hf`:
log-likelihoods, greediness and greedy texts are compared document by document.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import RemoteTokenizer
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
URL = os.environ["EXPERTLINE_URL"]
CHECKPOINT = os.environ["EXPERTLINE_CHECKPOINT"]
TASKS = ["choices", "target", "passages", "greedy"]
TOLERANCE = 1e-3
WINDOW_TOKENS = 96  # shorter than the longest passage
HF = {
    "pretrained": CHECKPOINT,
    "dtype": "float32",
    "device": "cpu",
    "add_bos_token": True,
    "max_length": WINDOW_TOKENS,
}
SERVED = {
    "model": "nano",
    "base_url": f"{URL}/v1/completions",
    "tokenizer": CHECKPOINT,
    "tokenizer_backend": "huggingface",
    "num_concurrent": 4,
    "add_bos_token": True,
    "max_length": WINDOW_TOKENS + 2,  # it keeps one for the context and one for an output
}


def answers(backend: str, arguments: dict[str, Any], tasks: list[str]) -> dict[tuple, Any]:
    """What a backend said to each request of each document."""
    done = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(HERE / "tasks"), include_defaults=False),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert done is not None
    return {
        (task, sample["doc_id"], index): said
        for task, samples in done["samples"].items()
        for sample in samples
        for index, (said,) in enumerate(sample["resps"])
    }


def largest_difference(served: dict[tuple, Any], reference: dict[tuple, Any]) -> float:
    assert served.keys() == reference.keys()
    largest = 0.0
    for request, expected in reference.items():
        said = served[request]
        if isinstance(expected, str):
            assert said == expected, (request, said, expected)
            continue
        (likelihood, *greedy), (expected_likelihood, *expected_greedy) = pair(said), pair(expected)
        assert greedy == expected_greedy, (request, said, expected)
        difference = abs(likelihood - expected_likelihood)
        assert difference < TOLERANCE, (request, said, expected)
        largest = max(largest, difference)
    return largest


def pair(said: Any) -> tuple:
    """(log-likelihood, is greedy); of a passage the log-likelihood alone."""
    values = said if isinstance(said, (list, tuple)) else (said,)
    assert math.isfinite(values[0])
    return tuple(values)


def remote_tokenizer() -> None:
    """The server's tokenizer endpoints agree with the checkpoint's own tokenizer."""
    own = AutoTokenizer.from_pretrained(CHECKPOINT)
    remote = RemoteTokenizer(URL)
    assert (remote.bos_token, remote.eos_token) == (own.bos_token, own.eos_token)
    for line in Path("tasks/passages.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = own.encode(text, add_special_tokens=False)
        assert remote.encode(text) == ids
        assert remote.decode(ids) == text
        chat = [{"role": "user", "content": text}]
        expected = own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert remote.apply_chat_template(chat, bos_token=remote.bos_token) == expected


if __name__ == "__main__":
    os.chdir(HERE)  # the tasks name their data from here
    torch.set_num_threads(1)  # the server beside it needs the other cores
    remote_tokenizer()
    reference = answers("hf", HF, TASKS)
    as_ids = answers("local-completions", SERVED | {"tokenized_requests": True}, TASKS)
    largest = largest_difference(as_ids, reference)
    as_text = answers("local-completions", SERVED | {"tokenized_requests": False}, ["greedy"])
    assert as_text == {request: reference[request] for request in as_text}
    print(f"{len(reference)} requests, log-likelihoods within {largest:.1e}")
