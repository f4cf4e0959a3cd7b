"""Who is compared, and how each one is started and asked."""

import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtest.peers.bursts import run_bursts
from loadtest.peers.environments import (
    HOME,
    OWN_EXPERTLINE,
    OWN_PYTHON,
    VLLM_PYTHON,
    Environment,
    install_ray,
    install_vllm,
)
from loadtest.peers.figures import Part, Values, http_figures, offline_figures
from loadtest.peers.plan import MAX_MODEL_LEN, Plan
from loadtest.peers.process import PeerFailed, last_words, output_of, started

_OFFLINE_S = 1200.0
_READY_S = 600.0
_POLL_S = 0.5
_NAME = "peer"


@dataclass(frozen=True, slots=True)
class Subject:
    """What all candidates are given alike."""

    plan: Plan
    model: Path
    cores: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Candidate(ABC):
    """One line of the table."""

    name: str
    part: Part

    @abstractmethod
    def prepare(self, environment: Environment) -> None:
        """Installs what it needs; raises PeerFailed where that cannot be."""

    @abstractmethod
    def measure(self, subject: Subject) -> Values:
        """Its figures; raises PeerFailed where it has none."""

    @property
    def log(self) -> Path:
        return HOME / "logs" / f"{self.name.replace(' ', '-')}.log"


@dataclass(frozen=True)
class Offline(Candidate):
    """A script that reads the job and tells what it took."""

    python: str = OWN_PYTHON
    module: str = "loadtest.peers.expertline_offline"
    arguments: tuple[str, ...] = ()
    threads: int | None = None  # default: one a core
    variables: Mapping[str, str] = field(default_factory=dict)

    def prepare(self, environment: Environment) -> None:
        if self.python == VLLM_PYTHON:
            install_vllm(environment)

    def measure(self, subject: Subject) -> Values:
        job = subject.plan.job(str(subject.model), self.threads or subject.cores)
        command = [self.python, "-m", self.module, *self.arguments]
        environment = {**subject.environment, **self.variables}
        said = output_of(command, environment, self.log, _OFFLINE_S, json.dumps(job))
        told = [line for line in said.splitlines() if line.startswith('{"runs"')]
        if not told:
            raise PeerFailed("it told no figures")
        try:
            return offline_figures(json.loads(told[-1])["runs"])
        except ValueError as error:
            raise PeerFailed(str(error)) from error


@dataclass(frozen=True)
class Server(Candidate):
    """A server with OpenAI's completions, under load from outside."""

    program: str = OWN_EXPERTLINE
    command: tuple[str, ...] = ()  # its arguments; {model}, {name} and {port} are filled in
    variables: Mapping[str, str] = field(default_factory=dict)
    needs_ray: bool = False

    def prepare(self, environment: Environment) -> None:
        if self.needs_ray:
            install_ray(environment)
        elif self.program == VLLM_PYTHON:
            install_vllm(environment)

    def measure(self, subject: Subject) -> Values:
        port = _free_port()
        words = {"model": str(subject.model), "name": _NAME, "port": str(port)}
        command = [self.program, *(word.format(**words) for word in self.command)]
        url = f"http://127.0.0.1:{port}"
        plan = subject.plan
        with started(command, {**subject.environment, **self.variables}, self.log) as process:
            deadline = time.monotonic() + _READY_S
            while not _serves(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PeerFailed(last_words(self.log) or "it did not come up")
                time.sleep(_POLL_S)
            bursts = [plan.prompts(burst) for burst in range(plan.bursts + 1)]
            reports = run_bursts(url, _NAME, bursts, plan.output)
        return http_figures(reports[1:])  # the first one warms it up


def _serves(url: str) -> bool:
    """Whether a token can be had; servers list their model before they can serve it."""
    body = {"model": _NAME, "prompt": [5, 6, 7], "max_tokens": 1}
    try:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).is_success
    except httpx.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


TRANSFORMERS = "transformers"
VLLM = "vLLM"
VLLM_SERVER = "vLLM server"
RAY_LLM = "Ray Serve LLM"
OURS = "Expertline"
OURS_INT8 = "Expertline int8"
OURS_SERVER = "Expertline server"


def candidates(cores: int) -> Sequence[Candidate]:
    """Everybody, in the order in which each round goes through them.

    vLLM gets all cores: left to itself it keeps one back, and computes on half of two.
    """
    vllm = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}" if cores > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    column = ("--stages", "1", "--expert-parallel", str(cores))
    pipeline = ("--stages", str(cores), "--expert-parallel", "1")
    int8 = ("--quantize", "int8")
    return [
        Offline(TRANSFORMERS, "offline", module="loadtest.peers.transformers_offline"),
        Offline(
            VLLM, "offline", python=VLLM_PYTHON, module="loadtest.peers.vllm_offline",
            variables=vllm,
        ),
        Offline(f"{OURS} 1x1", "offline"),
        Offline(f"{OURS} 1x{cores}", "offline", arguments=column, threads=1),
        Offline(f"{OURS} {cores}x1", "offline", arguments=pipeline, threads=1),
        Offline(f"{OURS_INT8} 1x1", "offline", arguments=int8),
        Offline(f"{OURS_INT8} 1x{cores}", "offline", arguments=(*column, *int8), threads=1),
        Server(
            VLLM_SERVER, "http", program=VLLM_PYTHON, variables=vllm,
            command=(
                "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}",
                "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}",
                "--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN),
                "--no-enable-prefix-caching",
            ),
        ),
        Server(
            RAY_LLM, "http", program=VLLM_PYTHON, variables=vllm, needs_ray=True,
            command=(
                "-m", "loadtest.peers.ray_llm_server", "--model", "{model}", "--name", "{name}",
                "--port", "{port}", "--max-model-len", str(MAX_MODEL_LEN),
            ),
        ),
        Server(
            OURS_SERVER, "http",
            command=(
                "up", "--model", "{model}", "--name", "{name}",
                "--port", "{port}", "--dtype", "bfloat16", "--threads", str(cores),
                "--cache-tokens", "16384", "--max-model-len", str(MAX_MODEL_LEN),
            ),
        ),
    ]  # fmt: skip
