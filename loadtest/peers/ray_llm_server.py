"""ray.serve.llm over vLLM on the CPU, until SIGINT. Runs in vLLM's environment."""

import argparse
import json
import signal
import threading

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.llm import LLMConfig, build_openai_app


def config(model: str, name: str, max_model_len: int) -> LLMConfig:
    """One replica on this machine's processors; a bundle without GPU is what makes it fit."""
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        engine_kwargs={
            "dtype": "bfloat16",
            "max_model_len": max_model_len,
            "enable_prefix_caching": False,
            "tensor_parallel_size": 1,
        },
        accelerator_type=None,
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 256},
        log_engine_metrics=False,
    )


def main() -> None:
    """Starts Ray, serves, says so in one line, and waits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    # more CPUs than there are: Ray only counts them, and Serve's own actors want some
    ray.init(include_dashboard=False, num_cpus=16, object_store_memory=200 * 1024 * 1024)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=options.port))
        application = build_openai_app(
            {"llm_configs": [config(options.model, options.name, options.max_model_len)]}
        )
        serve.run(application, name="llm", route_prefix="/", blocking=False)
        print(json.dumps({"ready": f"http://127.0.0.1:{options.port}"}), flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
