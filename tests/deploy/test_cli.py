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

NANO = Path(__file__).parents[2] / "model" / "nano" / "checkpoint"


def expertline(
    *arguments: str, timeout_s: float = 120, **more: str
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
    report = json.loads(result.stdout)
    assert report["int8"]["tokens"] == report["bfloat16"]["tokens"] > 1000
    assert 2 < report["bfloat16"]["perplexity"] < 40
    assert report["perplexity_ratio"] == pytest.approx(1, abs=0.01)


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
