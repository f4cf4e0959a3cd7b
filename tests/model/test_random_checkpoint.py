"""Random checkpoints: the published layout to the letter, as transformers itself reads it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV2ForCausalLM

from model.checkpoint import cell_bytes, check, describe, read_cell
from model.config import CheckpointError, ModelConfig
from model.layout import Cell, Layout
from model.random_checkpoint import NANO, SHAPES, random_cell, write_random
from model.shards import INDEX, SINGLE
from model.tokenizer import Tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = {
    "236b": DATA / "deepseek-coder-v2-instruct.config.json",
    "lite": DATA / "deepseek-coder-v2-lite-instruct.config.json",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    config = ModelConfig.from_directory(directory)
    cells = read_cell(directory, config, Layout(config, 1, 1), Cell(0, 0), torch.float32)
    return dict(cells)


def test_the_nano_shape_is_the_bundled_model() -> None:
    assert json.loads((NANO / "config.json").read_text()) == SHAPES["nano"]


@pytest.mark.parametrize("shape", PUBLISHED)
def test_the_large_shapes_are_the_published_ones(shape: str) -> None:
    if not PUBLISHED[shape].is_file():
        pytest.skip("no published config at hand")
    published = json.loads(PUBLISHED[shape].read_text())
    assert SHAPES[shape].items() <= published.items()
    assert ModelConfig.from_dict(SHAPES[shape]) == ModelConfig.from_dict(published)


def test_bench_1b_has_the_parameters_that_its_name_says() -> None:
    config = ModelConfig.from_dict(SHAPES["bench-1b"])
    count = cell_bytes(config, Layout(config, 1, 1), Cell(0, 0), torch.int8)
    assert count == pytest.approx(1.26e9, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "layers", "shard_bytes"),
    [("nano", None, 2**32), ("nano", 3, 3_000_000), ("bench-1b", 2, 100_000_000)],
)
def test_transformers_loads_it_and_activations_are_sane(
    tmp_path: Path, shape: str, layers: int | None, shard_bytes: int
) -> None:
    write_random(shape, tmp_path, layers=layers, shard_bytes=shard_bytes)
    config = ModelConfig.from_directory(tmp_path)
    check(tmp_path, config)
    model, loading = DeepseekV2ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert sum(p.numel() for p in model.parameters()) == describe(tmp_path).parameters
    ids = torch.tensor([Tokenizer.from_directory(tmp_path, config).encode_text("def f(x):")])
    with torch.no_grad():
        logits = model(ids).logits.float()
    assert logits.shape[-1] == config.vocab_size
    assert 0.1 < logits.std() < 3.0


def test_shards_are_named_and_indexed_as_published(tmp_path: Path) -> None:
    write_random("nano", tmp_path, layers=2, shard_bytes=2_500_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards[0] == f"model-00001-of-{count:05}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == describe(tmp_path).bytes
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert {name for name, at in index["weight_map"].items() if at == shard} == held.keys()
        assert sum(t.numel() * 2 for t in held.values()) <= 2_500_000 or len(held) == 1
    assert not (tmp_path / SINGLE).exists()


def test_weights_follow_from_the_seed_alone(tmp_path: Path) -> None:
    for name, seed, shard_bytes in (("a", 1, 2**32), ("b", 1, 2_000_000), ("c", 2, 2**32)):
        write_random("nano", tmp_path / name, layers=2, seed=seed, shard_bytes=shard_bytes)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert not torch.equal(a["lm_head.weight"], a["model.embed_tokens.weight"])
    assert a["lm_head.weight"].std() == pytest.approx(0.02, rel=0.01)
    assert (a["model.norm.weight"] == 1).all()


def test_a_cell_that_is_made_is_the_one_that_is_written(tmp_path: Path) -> None:
    write_random("nano", tmp_path, layers=2, seed=3)
    config = ModelConfig.from_directory(tmp_path)
    layout, cell = Layout(config, 2, 4), Cell(1, 2)
    written = dict(read_cell(tmp_path, config, layout, cell, torch.bfloat16))
    made = dict(random_cell(config, layout, cell, torch.bfloat16, "cpu", seed=3))
    assert list(made) == list(written)
    assert all(torch.equal(made[name], written[name]) for name in made)


def test_progress_ends_at_the_whole_and_dtype_is_kept(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_random(
        "nano", tmp_path, layers=1, dtype=torch.float32, progress=lambda *p: told.append(p)
    )
    described = describe(tmp_path)
    assert told == sorted(told)
    assert told[-1] == (described.bytes, described.bytes)
    assert described.dtypes == {"float32": described.tensors}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_every_shape_serves_with_the_bundled_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.random_checkpoint.write_shards", lambda *_: None)
    for shape in SHAPES:
        write_random(shape, tmp_path / shape, layers=1)
        config = ModelConfig.from_directory(tmp_path / shape)
        tokenizer = Tokenizer.from_directory(tmp_path / shape, config)
        assert tokenizer.token_bytes(tokenizer.bos_id) == "<｜begin▁of▁sentence｜>".encode()
        generation = json.loads((tmp_path / shape / "generation_config.json").read_text())
        assert generation["eos_token_id"] == config.eos_token_id


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = [
        ({"shape": "huge", "directory": tmp_path / "x"}, "choose one of nano"),
        ({"shape": "nano", "directory": tmp_path}, "not empty"),
        ({"shape": "nano", "directory": tmp_path / "file"}, "choose another"),
        ({"shape": "nano", "directory": tmp_path / "x", "layers": 6}, "choose 1 to 5"),
        ({"shape": "nano", "directory": tmp_path / "x", "layers": 0}, "choose 1 to 5"),
        ({"shape": "nano", "directory": tmp_path / "x", "dtype": torch.int8}, "choose bfloat16"),
    ]
    for arguments, message in refused:
        with pytest.raises(CheckpointError, match=message):
            write_random(**arguments)


def test_a_disk_that_is_too_small_is_noticed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        free = 10**9

    monkeypatch.setattr("shutil.disk_usage", lambda _: Small)
    with pytest.raises(CheckpointError, match=r"needs 471\.5 GB and the disk has 1\.0 GB"):
        write_random("236b", tmp_path)


def test_an_interrupted_run_leaves_no_checkpoint(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random("nano", tmp_path, layers=1, progress=stop)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_directory(tmp_path)
