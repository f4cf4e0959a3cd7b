"""The real exchanges: the network computes what transformers computes, over any layout."""

from zlib import crc32

import pytest
import torch

from model.config import ModelConfig
from model.moe import LocalExperts
from model.weights import WeightFormat
from serving.gang.exchange import EXCHANGES
from tests.gang.gloo import GROUPS, real_exchanges, together
from tests.model.harness import Gang
from tests.model.oracle import oracle
from tests.model.test_parity import LAYOUTS, MODELS, SCHEDULES, check_schedules

LARGEST = (4, 2)


@pytest.mark.parametrize(
    ("stages", "ranks", "fabric"),
    [(*layout, "shared_memory") for layout in LAYOUTS if layout[1] > 1] + [(*LARGEST, "gloo")],
)
@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(
    name: str, stages: int, ranks: int, kind: str, fabric: str
) -> None:
    model = oracle(name)
    exchanges = real_exchanges(kind, fabric)
    gang = Gang(model.config, model.tensors, stages, ranks, exchanges=exchanges)
    check_schedules(model, gang, SCHEDULES | {"one_by_one": [1] * 10})


def experts_of(config: ModelConfig, held: range, device: str = "cpu") -> LocalExperts:
    """Experts whose weights depend only on their id."""
    with torch.device(device):
        experts = LocalExperts(config, held, WeightFormat(torch.float32))
    for name, place in experts.slots("experts"):
        numbers = torch.Generator().manual_seed(crc32(name.encode()))
        place.put(torch.empty(place.shape, device="cpu").normal_(std=0.1, generator=numbers))
    experts.pack()
    return experts


@pytest.mark.parametrize("fabric", GROUPS)
@pytest.mark.parametrize("kind", EXCHANGES)
@pytest.mark.parametrize("rows", [[5, 5], [1, 9], [3, 1, 7, 2]])
def test_uneven_rows_come_home_with_all_their_experts_words(
    kind: str, rows: list[int], fabric: str
) -> None:
    config, ranks = oracle("like-236b").config, len(rows)
    share = config.n_routed_experts // ranks
    fabrics = GROUPS[fabric](ranks)
    torch.manual_seed(1)
    inputs = [
        (
            torch.randn(count, config.hidden_size),
            torch.stack([torch.randperm(config.n_routed_experts)[:4] for _ in range(count)]),
            torch.rand(count, 4),
        )
        for count in rows
    ]

    def run(rank: int) -> tuple[torch.Tensor, int]:
        exchange = EXCHANGES[kind](fabrics[rank], config.n_routed_experts)
        exchange.begin(rows)
        experts = experts_of(config, range(rank * share, (rank + 1) * share))
        return exchange(*inputs[rank], experts), exchange.bytes_sent

    whole = experts_of(config, range(config.n_routed_experts))
    for rank, (out, sent) in enumerate(together(ranks, run)):
        torch.testing.assert_close(out, whole(*inputs[rank]), rtol=1e-5, atol=1e-5)
        assert sent > 0


@pytest.mark.parametrize("fabric", GROUPS)
def test_all_to_all_sends_a_row_once_to_each_rank_that_it_needs(fabric: str) -> None:
    config, ranks = oracle("like-236b").config, 4
    fabrics = GROUPS[fabric](ranks)
    share = config.n_routed_experts // ranks
    ids = torch.arange(4).repeat(6, 1)  # every row needs experts of rank 0 alone
    hidden, weights = torch.randn(6, config.hidden_size), torch.rand(6, 4)

    def run(rank: int) -> int:
        exchange = EXCHANGES["all_to_all"](fabrics[rank], config.n_routed_experts)
        exchange.begin([6] * ranks)
        exchange(hidden, ids, weights, experts_of(config, range(rank * share, (rank + 1) * share)))
        return exchange.bytes_sent

    row_bytes = config.hidden_size * 4
    sent = together(ranks, run)
    assert sent[0] == 6 * 3 * row_bytes  # rank 0 answers the others and asks nobody
    assert sent[1:] == [6 * (row_bytes + 4 * 8)] * 3
