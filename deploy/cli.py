"""The `expertline` command. Errors are one line on stderr; heavy imports wait until needed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from deploy.errors import OperationError, StartError, UsageError

app = typer.Typer(
    help="Serve DeepSeek-Coder-V2 on the GPU nodes you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
checkpoints = typer.Typer(help="Make and look at checkpoints.", no_args_is_help=True)
app.add_typer(checkpoints, name="checkpoint")
_console = Console()
Endpoint = Literal["completions", "chat"]

ModelOption = Annotated[str | None, typer.Option(help="checkpoint folder, or `nano`")]
StagesOption = Annotated[int | None, typer.Option(help="pipeline stages")]
ExpertsOption = Annotated[int | None, typer.Option(help="expert-parallel ranks per stage")]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="int8: routed experts, on CPUs; fp8 or fp8_tensor: matrices")
]
CacheDtypeOption = Annotated[str | None, typer.Option(help="fp8: latents in 8 bits")]
ExchangeOption = Annotated[str | None, typer.Option(help="gather or all_to_all")]
FabricOption = Annotated[str | None, typer.Option(help="auto, shared_memory or gloo, on CPUs")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads per rank")]
CacheOption = Annotated[int | None, typer.Option(help="cache tokens per column of ranks")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="settings as YAML")]


def main() -> None:
    """Entry point: user errors end with code 2 and one line, what failed with 1."""
    try:
        app(standalone_mode=False)
    except UsageError as error:
        _end(str(error), 2)
    except (StartError, OperationError) as error:
        _end(str(error), 1)
    except typer.Exit as ending:
        sys.exit(ending.exit_code)
    except typer.Abort:
        sys.exit(130)
    except TyperException as error:
        _end(error.format_message(), 2)


def _end(message: str, code: int) -> NoReturn:
    print(f"expertline: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@app.command()
def up(
    model: ModelOption = None,
    name: Annotated[str | None, typer.Option(help="model id that clients use")] = None,
    stages: StagesOption = None,
    expert_parallel: ExpertsOption = None,
    replicas: Annotated[int | None, typer.Option(help="engine replicas")] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    exchange: ExchangeOption = None,
    threads: ThreadsOption = None,
    cache_tokens: CacheOption = None,
    cache_dtype: CacheDtypeOption = None,
    max_model_len: Annotated[int | None, typer.Option(help="prompt + output tokens")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="one `name:key` per line")] = None,
    config: ConfigOption = None,
) -> None:
    """Serve a model until Ctrl-C: a local Ray, or the cluster that RAY_ADDRESS names."""
    from deploy.local_ray import check_address

    check_address()  # before what takes long to import
    from deploy.preflight import load_settings
    from deploy.up import up as run

    flags: dict[str, dict[str, Any]] = {
        "model": {
            "path": model,
            "name": name,
            "dtype": dtype,
            "quantize": quantize,
            "max_model_len": max_model_len,
        },
        "gang": {
            "stages": stages,
            "expert_parallel": expert_parallel,
            "exchange": exchange,
            "threads": threads,
            "cache_tokens": cache_tokens,
            "cache_dtype": cache_dtype,
        },
        "engine": {"replicas": replicas},
        "ingress": {"host": host, "port": port, "api_keys_file": api_keys_file},
    }
    run(load_settings(config, flags), _console)


@app.command()
def drain(
    engine: Annotated[str | None, typer.Option(help="id of an engine, or its beginning")] = None,
    node: Annotated[str | None, typer.Option(help="address of a node, or its id")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds to wait for the end")] = 120.0,
) -> None:
    """Make an engine, or a whole node, leave without a request being lost; Serve replaces it."""
    from deploy.drain import drain_engine, drain_node

    if (engine is None) == (node is None):
        raise UsageError("give either --engine or --node")
    if engine is not None:
        drain_engine(engine, timeout, _console)
    elif node is not None:
        drain_node(node, timeout, _console)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="a running server")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the server's first")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = 512,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
) -> None:
    """Talk to a running server from the terminal."""
    from deploy.chat import ChatOptions, talk

    talk(ChatOptions(url, model, system, temperature, max_tokens, api_key), _console)


@app.command()
def bench(
    model: ModelOption = None,
    stages: StagesOption = None,
    expert_parallel: ExpertsOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    cache_dtype: CacheDtypeOption = None,
    exchange: ExchangeOption = None,
    fabric: FabricOption = None,
    threads: ThreadsOption = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="requests at once")] = 16,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of each")] = 256,
    output: Annotated[int, typer.Option(min=1, help="generated tokens of each")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace of the steps")] = None,
    load: Annotated[bool, typer.Option("--load", help="measure loading, not steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Engine speed without HTTP and without Ray: random prompts, no early stop.

    With --model random:SHAPE or random:SHAPE:LAYERS, ranks make their weights themselves.
    """
    from deploy import load_bench
    from deploy.bench import BenchPlan, run_bench, show
    from deploy.checkpoints import made_if_random
    from deploy.preflight import check_model, load_settings

    flags: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype, "quantize": quantize},
        "gang": {
            "stages": stages,
            "expert_parallel": expert_parallel,
            "exchange": exchange,
            "fabric": fabric,
            "threads": threads,
            "cache_dtype": cache_dtype,
        },
    }
    with made_if_random(load_settings(None, flags)) as settings:
        check_model(settings)
        if load:
            report, shown = load_bench.run_load_bench(settings), load_bench.show
        else:
            report = run_bench(settings, BenchPlan(batch, prompt, output, seed), trace)
            shown = show
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        shown(report, _console)


@app.command()
def loss(
    model: ModelOption = None,
    stages: StagesOption = None,
    expert_parallel: ExpertsOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    cache_dtype: CacheDtypeOption = None,
    documents: Annotated[int, typer.Option(min=1, help="pieces of held-out files")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Loss on held-out code, and what fewer bits cost; all ways, or those that are named."""
    from deploy.loss import run_loss, show
    from deploy.preflight import check_model, load_settings

    flags: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype, "quantize": quantize},
        "gang": {
            "stages": stages,
            "expert_parallel": expert_parallel,
            "cache_dtype": cache_dtype,
        },
    }
    settings = load_settings(None, flags)
    check_model(settings)
    report = run_loss(settings, documents)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report, _console)


@app.command()
def loadtest(
    url: Annotated[str, typer.Option(help="an OpenAI-compatible server")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="default: the server's first")] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="mean requests per second")] = 2.0,
    requests: Annotated[int | None, typer.Option(min=1, help="stop after so many")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="or after seconds")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    endpoint: Annotated[Endpoint, typer.Option()] = "completions",
    fim_share: Annotated[float, typer.Option(help="completions with a suffix, 0 to 1")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the report here")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
) -> None:
    """Open-loop load against a server, every answer checked."""
    from deploy.loadtest import run_loadtest
    from loadtest.runner import LoadError, LoadPlan

    try:
        plan = LoadPlan(
            url=url,
            model=model,
            rate=rate,
            duration_s=duration,
            requests=60 if requests is None and duration is None else requests,
            max_tokens=max_tokens,
            endpoint=endpoint,
            seed=seed,
            fim_share=fim_share,
            api_key=api_key,
        )
    except LoadError as error:
        raise UsageError(str(error)) from error
    run_loadtest(plan, json_path, _console)


@checkpoints.command("random")
def checkpoint_random(
    out: Annotated[Path, typer.Option(help="new folder")],
    shape: Annotated[str, typer.Option(help="nano, bench-1b, lite or 236b")] = "nano",
    layers: Annotated[int | None, typer.Option(min=1, help="cut to this many layers")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    weights: Annotated[
        bool, typer.Option(help="without, each rank makes its own on its device")
    ] = True,
) -> None:
    """Write a random checkpoint in the Hugging Face layout."""
    from deploy.checkpoints import make_random

    make_random(shape, out, layers, seed, weights, _console)


@checkpoints.command("quantize")
def checkpoint_quantize(
    source: Annotated[Path, typer.Argument(help="checkpoint folder")],
    out: Annotated[Path, typer.Argument(help="new folder")],
    fp8_block: Annotated[
        bool, typer.Option("--fp8-block", help="8-bit floats, a scale for each 128 x 128")
    ] = False,
    fp8_tensor: Annotated[
        bool, typer.Option("--fp8-tensor", help="8-bit floats, a scale for each matrix")
    ] = False,
) -> None:
    """Write a checkpoint once more, its matrices in 8-bit floats."""
    from deploy.checkpoints import quantize

    if fp8_block == fp8_tensor:
        raise UsageError("choose one of --fp8-block and --fp8-tensor")
    quantize(source, out, "fp8-block" if fp8_block else "fp8-tensor", _console)


@checkpoints.command("inspect")
def checkpoint_inspect(
    directory: Annotated[Path, typer.Argument(help="checkpoint folder")],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what a checkpoint holds and whether it is whole."""
    from deploy.checkpoints import inspect

    inspect(directory, as_json, _console)
