"""Our own CPU kernels against the reference in fp32, at the sizes where they do the work."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.ops import native, reference
from model.ops.native import build
from model.quantize import from_int8, int8

pytestmark = pytest.mark.skipif(not native.LOADED, reason="no AVX2 or no g++ here")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True, params=build.instruction_sets(), ids=lambda needs: needs[0])
def _on_every_instruction_set(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with AVX-512 runs what others would, too."""
    monkeypatch.setattr(native, "_kernels", native.load(request.param))
    torch.manual_seed(0)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-2) -> None:
    """Within a share of the largest magnitude: bf16 rounds sums, not their parts."""
    assert found.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.float() / scale, expected.float() / scale, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("inputs", [96, 300])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 13, 200])
def test_linear(rows: int, inputs: int) -> None:
    x, weight = torch.randn(rows, inputs).to(BF16), (torch.randn(192, inputs) / 8).to(BF16)
    packed = native.panels(weight)
    assert packed is not None
    close(native.linear(x, packed), x.float() @ weight.float().t())


@pytest.mark.parametrize("contiguous", [True, False])
def test_each_head_has_its_own_weight(contiguous: bool) -> None:
    x, weight = torch.randn(9, 3, 128).to(BF16), (torch.randn(3, 64, 128) / 8).to(BF16)
    packed = native.panels(weight)
    assert packed is not None
    given = x if contiguous else torch.cat((x, x), dim=-1)[..., :128]
    expected = torch.einsum("nhi,hoi->nho", x.float(), weight.float())
    close(native.linear_heads(given, packed), expected)


@pytest.mark.parametrize("shape", [(65, 64), (64, 63)])
def test_sizes_that_do_not_fit_are_left_to_others(shape: tuple[int, int]) -> None:
    assert native.panels(torch.zeros(shape, dtype=BF16)) is None


def test_rows_are_normed_where_they_lie() -> None:
    wide, weight = torch.randn(5, 96).to(BF16), torch.randn(64).to(BF16)
    found = native.rms_norm(wide[:, :64], weight, 1e-6)
    assert found is not None
    close(found, reference.rms_norm(wide[:, :64], weight, 1e-6), 4e-3)


def test_silu_mul() -> None:
    x = (torch.randn(7, 128) * 20).to(BF16)
    found = native.silu_mul(x)
    assert found is not None
    close(found, reference.silu_mul(x.float()), 4e-3)


def test_rotation_in_place() -> None:
    x, angles = torch.randn(5, 3, 192).to(BF16), torch.randn(5, 32)
    expected = x.clone()
    reference.rotate_(expected[..., 128:], angles.cos(), angles.sin())
    assert native.rotate_(x[..., 128:], angles.cos(), angles.sin())
    close(x, expected, 4e-3)
    assert torch.equal(x[..., :128], expected[..., :128])


@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(64, 8, 3, 6), (160, 1, 1, 6)])
def test_route(experts: int, groups: int, kept: int, top_k: int) -> None:
    logits = torch.randn(50, experts)
    ids, weights = native.route(logits, top_k, groups, kept, 16.0)
    expected_ids, expected = reference.route(logits, top_k, groups, kept, 16.0)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


def test_a_row_without_numbers_is_routed_somewhere_and_stays_without() -> None:
    logits = torch.randn(2, 16)
    logits[0] = float("nan")
    ids, weights = native.route(logits, 4, 4, 2, 1.0)
    assert ((ids >= 0) & (ids < 16)).all()
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(1, 1, True), (70, 70, True), (300, 300, True), (5, 130, False)]
)
def test_attention_of_a_chunk(queries: int, keys: int, causal: bool) -> None:
    query, shared = torch.randn(queries, 3, 96).to(BF16), torch.randn(keys, 40).to(BF16)[:, 8:]
    both = torch.randn(keys, 3 * 128).to(BF16)  # keys of all heads, then values of all heads
    key, value = (each.unflatten(-1, (3, 64)) for each in both.chunk(2, dim=-1))
    found = native.attend(query, key, shared, value, 0.1, causal)
    assert found is not None
    plain = (each.float() for each in (query, key, shared, value))
    for each, expected in zip(found, reference.attend(*plain, 0.1, causal), strict=True):
        close(each, expected)


def test_a_query_without_numbers_spoils_no_other() -> None:
    query, key = torch.randn(9, 2, 32).to(BF16), torch.randn(9, 2, 16).to(BF16)
    shared, value = torch.randn(9, 16).to(BF16), torch.randn(9, 2, 64).to(BF16)
    query[4, 1, 0] = float("nan")
    found = native.attend(query, key, shared, value, 0.1, True)
    assert found is not None
    assert found[0][4, 1].isnan().all()
    assert found[0].isnan().sum() == 64


@pytest.mark.parametrize("heads", [4, 8, 12, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_over_pages(heads: int, threads: int) -> None:
    cache = torch.randn(12, 64, 576).to(BF16)
    pages = torch.tensor([[3, 9, 1, 7], [2, 5, 0, 0], [8, 10, 0, 0], [4, 0, 0, 0], [6, 0, 0, 0]])
    lengths = torch.tensor([201, 128, 65, 3, 1])
    query = torch.randn(5, heads, 576).to(BF16)
    expected = reference.attend_pages(query.float(), cache, pages, lengths, 512, 0.05)
    for row, length in enumerate(lengths.tolist()):  # what is not seen may be anything
        page = pages[row, (length - 1) // 64]
        if length % 64:
            cache[page, length % 64 :] = float("nan")
    with at_threads(threads):
        found = native.attend_pages(query, cache, pages, lengths, 512, 0.05)
    assert found is not None
    close(found, expected)


def test_a_cache_row_without_numbers_spoils_only_its_own_sequence() -> None:
    cache = torch.randn(3, 64, 64).to(BF16)
    cache[1, 5] = float("nan")
    query, pages = torch.randn(2, 4, 64).to(BF16), torch.tensor([[1], [2]])
    found = native.attend_pages(query, cache, pages, torch.tensor([9, 9]), 32, 1.0)
    assert found is not None
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def experts_case(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, ids of which 4 to 11 are here, weights, gate and up, down."""
    gate_up = (torch.randn(8, 128, 192) / 8).to(BF16)
    down = (torch.randn(8, 192, 64) / 8).to(BF16)
    ids = torch.rand(rows, 16).topk(3).indices - 1  # -1 to 14
    return torch.randn(rows, 192).to(BF16), ids, torch.rand(rows, 3), gate_up, down


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("rows", [0, 1, 60])
def test_weighted_experts(rows: int, quantize: str | None) -> None:
    hidden, ids, weights, gate_up, down = experts_case(rows)
    packed = native.pack_experts(gate_up, down, quantize)
    assert packed is not None
    found = native.weighted_experts(hidden, ids, weights, packed, 4)
    plain = reference.pack_experts(gate_up.float(), down.float(), quantize)
    expected = reference.weighted_experts(hidden.float(), ids, weights, plain, 4)
    close(found, expected)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_threads_change_nothing(quantize: str | None) -> None:
    hidden, ids, weights, gate_up, down = experts_case(40)
    packed = native.pack_experts(gate_up, down, quantize)
    assert packed is not None
    found = []
    for threads in (1, 2):
        with at_threads(threads):
            found.append(native.weighted_experts(hidden, ids, weights, packed, 4))
    assert torch.equal(*found)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_row_without_numbers_spoils_no_other(quantize: str | None) -> None:
    hidden, ids, weights, gate_up, down = experts_case(12)
    ids[3] = torch.tensor([4, 5, 6])
    packed = native.pack_experts(gate_up, down, quantize)
    assert packed is not None
    clean = native.weighted_experts(hidden, ids, weights, packed, 4)
    hidden[3, 7] = float("nan")
    found = native.weighted_experts(hidden, ids, weights, packed, 4)
    assert found[3].isnan().all()
    others = [row for row in range(12) if row != 3]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 40])
def test_int8_products_are_exact(rows: int) -> None:
    """Whole numbers with a largest of 127 have the scale 1, and a gate that large lets all pass."""
    hidden, gate = torch.randint(0, 128, (rows, 192)), torch.randint(0, 128, (64, 192))
    up, down = torch.randint(-127, 128, (64, 192)), torch.randint(-127, 128, (192, 64))
    for numbers in (hidden, gate, up, down):
        numbers[:, 5] = 127
    hidden[0], up[0], up[1] = 127, 127, -127  # sums as far from 0 as there are
    gate_up = torch.cat((gate, up))[None]
    packed = native.pack_experts(gate_up.to(BF16), down[None].to(BF16), "int8")
    assert packed is not None
    ids, weights = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1)
    found = native.weighted_experts(hidden.to(BF16), ids, weights, packed, 0)
    inner = ((hidden @ gate.t()).float() * (hidden @ up.t()).float()).to(BF16).float()
    most = inner.abs().amax(-1, keepdim=True)
    whole = (inner * (torch.tensor(127.0) / most)).round().long()
    assert torch.equal(found, ((whole @ down.t()).float() * (most / 127)).to(BF16))


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_numbers_are_rounded_to_the_nearest_and_of_two_to_the_even_one(value: float) -> None:
    steps = torch.arange(1, 5, dtype=torch.float32) / 256  # halves of bf16's last place
    x = torch.stack((torch.ones(4), steps)).to(BF16).t() * value  # [4, 2]
    weight = torch.zeros(64, 2, dtype=BF16)
    weight[0], weight[1, 0], weight[1, 1] = 1.0, float("inf"), 1.0
    packed = native.panels(weight)
    assert packed is not None
    found = native.linear(x, packed)
    assert torch.equal(found[:, 0], x.float().sum(-1).to(BF16))
    assert torch.equal(found[:, 1], torch.full((4,), value * float("inf"), dtype=BF16))


def test_int8_is_as_near_as_eight_bits_can_be() -> None:
    weight = torch.randn(3, 5, 40)
    weight[1, 2] = 0.0
    numbers, scales = int8(weight)
    assert numbers.dtype == torch.int8
    error = (from_int8(numbers, scales, torch.float32) - weight).abs()
    assert (error <= scales[..., None] / 2 + 1e-6).all()
    assert not from_int8(numbers, scales, torch.float32)[1, 2].any()


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library.__wrapped__(build.AVX2) is None


def test_a_compiler_that_fails_means_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/false")
    assert build.library.__wrapped__(build.AVX2) is None
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((*build.AVX512, "avx2"), (build.AVX512, build.AVX2)),
        (("avx2", "fma", "avx512f"), (build.AVX2,)),
        (("avx2",), ()),
    ],
)
def test_the_best_instruction_set_comes_first(
    flags: tuple[str, ...], expected: tuple[build.Needs, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"processor: 0\nflags\t\t: fpu {' '.join(flags)}\nbugs: none\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: said)
    assert build.instruction_sets.__wrapped__() == expected


def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    runs, compiler = tmp_path / "runs", tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\necho once >> {runs}\n", encoding="utf-8")
    compiler.chmod(0o700)
    path = tmp_path / "cache" / "kernels.so"
    with ThreadPoolExecutor(4) as ranks:
        made = list(ranks.map(lambda rank: build._compile([str(compiler)], path), range(4)))
    assert made == [True] * 4
    assert runs.read_text(encoding="utf-8") == "once\n"


def test_what_others_may_write_to_is_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "kernels.so"
    file.touch(mode=0o700)
    tmp_path.chmod(0o700)
    assert build._is_ours(file)
    file.chmod(0o722)
    assert not build._is_ours(file)
    file.chmod(0o700)
    tmp_path.chmod(0o770)
    assert not build._is_ours(file)
    assert not build._is_ours(tmp_path / "absent.so")


@contextmanager
def at_threads(threads: int) -> Iterator[None]:
    """torch's number of threads for the body of a `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
