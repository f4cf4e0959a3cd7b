"""The bundled model with attention by Triton: chunks, chunks with a past, and decode."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig
from model.ops import choice
from tests.model.harness import Gang, relative_error

NANO = Path(__file__).parents[3] / "model" / "nano" / "checkpoint"
OPERATIONS = ("write_rows", "read_rows", "attend", "attend_latents", "attend_pages", "merge")


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    yield
    choice.choose("cpu", "auto")


def logits(kind: str) -> torch.Tensor:
    """Of three steps: a prompt; some more of it while another begins; one token of each."""
    choice.choose("cpu", kind, OPERATIONS)
    config = ModelConfig.from_directory(NANO)
    gang = Gang(config, load_file(NANO / "model.safetensors"), pages=8)
    generator = torch.Generator().manual_seed(1)
    first, second = (
        gang.open(torch.randint(0, 4000, (count,), generator=generator).tolist())
        for count in (80, 8)
    )
    steps = [{first: 67}, {first: 12, second: 7}, {first: 1, second: 1}]
    return torch.cat([torch.stack(list(gang.advance(step).values())) for step in steps])


def test_attention_by_triton_gives_the_logits_of_the_reference() -> None:
    expected = logits("reference")
    assert choice.implementations("cpu")["attend"].__module__ == "model.ops.reference"
    found = logits("triton")
    assert choice.implementations("cpu")["attend"].__module__ == "model.ops.triton_attention"
    assert relative_error(found, expected) <= 1e-5
