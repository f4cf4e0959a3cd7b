"""The command line: what it refuses, in one line, and what it prints."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.checkpoints import made_if_random
from deploy.errors import UsageError
from deploy.load_bench import run_load_bench
from deploy.loss import modes as loss_modes
from deploy.loss import run_loss
from deploy.preflight import check_model
from model.config import ModelConfig
from model.random_checkpoint import write_random
from serving.config import Settings

NANO = Path(__file__).parents[2] / "model" / "nano" / "checkpoint"


def expertline(
    *arguments: str, timeout_s: float = 600, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | more
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )


def broken(tmp_path: Path, **changes: Any) -> Path:
    """A copy of nano with changes to its config.json."""
    directory = tmp_path / "broken"
    shutil.copytree(NANO, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("expertline: ")
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert word in lines[0]


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert_refused(expertline("up", "--model", str(tmp_path)), "no config.json")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert_refused(expertline("up", "--model", str(tmp_path / "none")), "no such directory")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    directory = broken(tmp_path, model_type="llama")
    assert_refused(expertline("up", "--model", str(directory)), "llama", "deepseek_v2")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    directory = broken(tmp_path)
    shard = directory / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    assert_refused(expertline("up", "--model", str(directory)), "model.safetensors")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    directory = broken(tmp_path, num_hidden_layers=6)
    assert_refused(expertline("up", "--model", str(directory)), "model.layers.5")


def test_more_stages_than_layers_are_refused() -> None:
    assert_refused(expertline("up", "--stages", "6"), "6 stages for 5 layers")


def test_experts_that_do_not_divide_are_refused() -> None:
    assert_refused(expertline("up", "--expert-parallel", "3"), "16 experts", "3 ranks")


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(expertline("up", "--port", str(port)), str(port), "--port")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["up", "--stages", "0"], "stages"),
        (["up", "--dtype", "float64"], "dtype"),
        (["up", "--colour", "red"], "--colour"),
        (["fly"], "fly"),
        (["bench", "--model", "nano", "--exchange", "mail"], "exchange"),
        (["bench", "--model", "nano", "--quantize", "int3"], "quantize"),
        (["checkpoint", "quantize", "from", "to"], "--fp8-block"),
        (["checkpoint", "random", "--shape", "huge", "--out", "x"], "huge"),
        (["loadtest", "--requests", "1", "--duration", "1"], "either"),
        (["loadtest", "--url", "http://127.0.0.1:9", "--requests", "1"], "127.0.0.1:9"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_wrong_words_are_refused(arguments: list[str], word: str) -> None:
    assert_refused(expertline(*arguments), word)


def test_settings_come_from_a_file_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("gang: {stages: 2, wheels: 4}\n")
    assert_refused(expertline("up", "--config", str(file)), "gang.wheels")


def test_flags_stand_above_the_file(tmp_path: Path) -> None:
    from deploy.preflight import load_settings

    file = tmp_path / "settings.yaml"
    file.write_text("gang: {stages: 2, threads: 3}\nmodel: {dtype: float32}\n")
    settings = load_settings(file, {"gang": {"stages": 4, "threads": None}})
    assert (settings.gang.stages, settings.gang.threads) == (4, 3)
    assert settings.model.dtype == "float32"


def test_a_random_checkpoint_is_written_and_inspected(tmp_path: Path) -> None:
    out = tmp_path / "new"
    made = expertline("checkpoint", "random", "--shape", "nano", "--layers", "2", "--out", str(out))
    assert made.returncode == 0, made.stderr
    found = expertline("checkpoint", "inspect", str(out), "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["config"]["num_hidden_layers"] == 2
    again = expertline("checkpoint", "random", "--shape", "nano", "--out", str(out))
    assert_refused(again, "new")


def test_bench_prints_its_figures_as_json() -> None:
    result = expertline(
        "bench", "--stages", "2", "--batch", "2", "--prompt", "16", "--output", "4", "--json"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert set(report["stages"]) == {"0", "1"}
    assert set(report["stages"]["0"]) == {"compute_s", "wait_s", "exchange_s"}
    for bubble in report["bubbles"].values():
        assert 0 <= bubble["theory"] < 1
        assert 0 < bubble["measured"] < 1


def test_bench_writes_a_timeline_of_every_part(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    sizes = ["--batch", "2", "--prompt", "16", "--output", "4"]
    result = expertline(
        "bench", "--stages", "2", "--expert-parallel", "2", *sizes, "--json", "--trace", str(file)
    )
    assert result.returncode == 0, result.stderr
    decode = json.loads(result.stdout)["trace_ms_per_step"]["decode"]
    assert set(decode["engine"]) == {"plan", "wire"}
    parts = {"wait", "attention", "gate", "exchange", "experts", "feed forward", "step"}
    assert set(decode["rank 0.1"]) == parts | {"hand over"}
    assert set(decode["rank 1.0"]) == parts | {"head", "sample"}
    assert {"ph", "pid", "tid", "ts", "dur", "name"} <= set(
        json.loads(file.read_text())["traceEvents"][0]
    )


def test_loss_tells_what_eight_bits_cost() -> None:
    result = expertline("loss", "--quantize", "int8", "--documents", "4", "--json")
    assert result.returncode == 0, result.stderr
    check_loss(json.loads(result.stdout), "int8")


def test_loss_tells_what_eight_bits_in_weights_and_cache_cost() -> None:
    bits = {"model": {"quantize": "fp8"}, "gang": {"cache_dtype": "fp8", "device": "cpu"}}
    check_loss(run_loss(Settings.model_validate(bits), documents=2), "fp8 + cache fp8")


def check_loss(report: dict[str, Any], mode: str) -> None:
    assert list(report) == ["bfloat16", mode]
    assert report[mode]["tokens"] == report["bfloat16"]["tokens"] > 500
    assert 2 < report["bfloat16"]["perplexity"] < 40
    assert report[mode]["perplexity_ratio"] == pytest.approx(1, abs=0.01)
    assert report[mode]["perplexity_ratio"] != 1


def test_loss_goes_through_all_modes_unless_some_are_named() -> None:
    def modes(device: str, **bits: dict[str, str]) -> list[str]:
        return list(loss_modes(Settings.model_validate(bits), device))

    assert modes("cpu")[:3] == ["bfloat16", "int8", "fp8"]
    assert "int8" not in modes("cuda")
    assert modes("cuda", gang={"cache_dtype": "fp8"}) == ["bfloat16", "cache fp8"]
    every = loss_modes(Settings(), "cpu").values()
    assert len({(each.model.quantize, each.gang.cache_dtype) for each in every}) == len(every)


def test_bench_compares_loading_with_the_disk(tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    write_random("nano", directory, layers=2, shard_bytes=4_000_000)
    gang = {"expert_parallel": 2, "cache_tokens": 128}
    wanted = Settings.model_validate({"model": {"path": str(directory)}, "gang": gang})
    report = run_load_bench(wanted)
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9
    assert size < report["load_gigabytes"] < 2 * size  # the experts once, the rest twice
    assert report["files"] > 1
    assert report["load_gigabytes_per_second"] > 0
    assert report["of_the_disk"] == pytest.approx(
        report["load_gigabytes_per_second"] / report["disk_gigabytes_per_second"]
    )


def test_a_shape_without_a_file_can_be_run_but_not_loaded() -> None:
    settings = Settings.model_validate({"model": {"path": "random:nano:2"}})
    with made_if_random(settings) as made:
        assert check_model(made).num_hidden_layers == 2
        assert made.model.served_name == "nano"
        with pytest.raises(UsageError, match="random weights are not loaded"):
            run_load_bench(made)
    assert not made.model.directory.exists()


@pytest.mark.parametrize("path", ["random:giant", "random:nano:x", "random:nano:9"])
def test_a_shape_that_there_is_not_is_refused(path: str) -> None:
    settings = Settings.model_validate({"model": {"path": path}})
    with pytest.raises(UsageError, match=r"giant|layers"), made_if_random(settings):
        pass


def test_a_checkpoint_is_quantized(tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    made = expertline("checkpoint", "quantize", "--fp8-tensor", str(NANO), str(out))
    assert made.returncode == 0, made.stderr
    assert ModelConfig.from_directory(out).quantization == "compressed-tensors"


@pytest.mark.parametrize("command", [("up",), ("drain", "--engine", "x")], ids=["up", "drain"])
def test_an_address_where_no_cluster_answers_is_refused(command: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert_refused(expertline(*command, RAY_ADDRESS=address), "RAY_ADDRESS", address)
    assert_refused(expertline(*command, RAY_ADDRESS=address), "RAY_ADDRESS", "refused")
    assert_refused(expertline(*command, RAY_ADDRESS="nonsense"), "RAY_ADDRESS", "nonsense")


def test_a_drain_needs_to_know_what_leaves() -> None:
    assert_refused(expertline("drain"), "--engine", "--node")
    assert_refused(expertline("drain", "--engine", "a", "--node", "b"), "--engine", "--node")
