"""The nano model's training: corpus, resumption, and a checkpoint that loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DeepseekV2ForCausalLM

from model.checkpoint import all_tensors
from model.config import ModelConfig
from model.nano import corpus
from model.nano.train import BUNDLED, Recipe, TrainingError, main, train
from model.shards import stored_tensors

ROW_TOKENS = 128
RECIPE = Recipe(batch_rows=1, limit_files=16, evaluation_rows=1, max_steps=4)


class Interrupted(Exception):
    """Stands in for a kill after some step."""


@pytest.fixture(scope="module", autouse=True)
def _short_rows():
    """A step of 512 tokens takes five seconds of a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.nano.train.ROW_TOKENS", ROW_TOKENS)
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other would take a multiple of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict]:
    """An uninterrupted run: its directory, losses and figures."""
    out = tmp_path_factory.mktemp("whole") / "run"
    losses: list[float] = []
    figures = train(out, RECIPE, seen=lambda _, loss: losses.append(loss))
    return out, losses, figures


def test_an_interrupted_run_goes_on_with_the_same_losses(whole, tmp_path: Path):
    out, losses = tmp_path / "run", {}

    def until_third(step: int, loss: float) -> None:
        losses[step] = loss
        if step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(out, RECIPE, save_every=2, seen=until_third)
    resumed: dict[int, float] = {}
    figures = train(out, RECIPE, resume=True, seen=resumed.__setitem__)
    assert list(resumed) == [3, 4]  # from the state saved after the second step
    assert [*list(losses.values())[:2], *resumed.values()] == whole[1]
    assert figures["held_out_nats_per_token"] == whole[2]["held_out_nats_per_token"]
    assert len(list((out / "state").glob("*.safetensors"))) == 1


def test_the_checkpoint_has_the_bundled_ones_tensors_and_files(whole):
    directory = whole[0] / "checkpoint"
    assert {path.name for path in directory.iterdir()} == {p.name for p in BUNDLED.iterdir()}
    shapes = {name: tensor.shape for name, tensor in stored_tensors(directory).items()}
    assert shapes == all_tensors(ModelConfig.from_directory(BUNDLED))
    assert {tensor.dtype for tensor in stored_tensors(directory).values()} == {torch.bfloat16}


def test_the_checkpoint_loads_in_transformers(whole):
    directory = whole[0] / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = DeepseekV2ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chat = [{"role": "user", "content": "Reverse a list."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == f"{corpus.SPECIALS[0]}User: Reverse a list.\n\nAssistant:"
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt").input_ids
    assert ids[0, 0] == corpus.BOS
    assert model(input_ids=ids).logits.isfinite().all()


def test_the_figures_are_written(whole):
    out, losses, figures = whole
    assert json.loads((out / "training.json").read_text()) == figures
    assert figures["steps"] == len(losses) == 4
    assert figures["tokens"] == 4 * ROW_TOKENS
    assert figures["held_out_nats_per_token"] < 9.0  # ln 4096 is 8.3
    assert "held-out" in (out / "train.log").read_text()


def test_a_run_refuses_an_occupied_directory_and_another_runs_state(whole, capsys):
    with pytest.raises(TrainingError, match="not empty"):
        train(whole[0], RECIPE)
    assert main(["--out", str(whole[0]), "--resume", "--seed", "7"]) == 1
    assert "another run" in capsys.readouterr().err


def test_nothing_to_resume_is_an_error(tmp_path: Path):
    with pytest.raises(TrainingError, match="no saved state"):
        train(tmp_path, RECIPE, resume=True)


def test_the_tokenizer_differs_from_the_bundled_one_in_its_vocabulary_alone(whole):
    bundled = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    trained = json.loads((whole[0] / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))
    for settings in (bundled, trained):
        del settings["model"]["vocab"], settings["model"]["merges"]
    assert trained == bundled


def test_too_small_a_corpus_is_refused():
    with pytest.raises(corpus.CorpusError, match="more files"):
        corpus.train_tokenizer([corpus.Source("a.py", "def f():\n    return 1\n")])


def test_fill_in_the_middle_keeps_every_character_and_the_markers_order():
    sources, _ = corpus.standard_library(limit=8)
    documents = corpus.training_documents(sources, seed=3, epochs=1)
    cut = [document for document in documents if corpus.HOLE in document]
    assert 0.3 < len(cut) / sum("User: " not in str(d[1]) for d in documents) < 0.7
    for bos, begin, prefix, hole, suffix, end, middle, eos in cut:
        markers = (bos, begin, hole, end, eos)
        assert markers == (corpus.BOS, corpus.BEGIN, corpus.HOLE, corpus.END, corpus.EOS)
        assert any(f"{prefix}{middle}{suffix}".rstrip("\n") in s.text for s in sources)


def test_special_tokens_inside_a_source_stay_text(whole):
    tokenizer = corpus.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = corpus.encode(tokenizer, [(corpus.BOS, f"x = '{corpus.SPECIALS[1]}'", corpus.EOS)])
    assert list(ids).count(corpus.EOS) == 1
    assert ids[0] == corpus.BOS
