"""The Serve application: which deployments there are, and how they are bound together.

import_path: serving.app:build        args: the settings tree of serving/config.py
"""

import secrets
from typing import Any

import torch
from ray import serve
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from serving.config import Settings
from serving.engine.driver import Engine
from serving.gang.placement import bundles
from serving.ingress.ingress import Ingress
from serving.router.router import Router

APP_NAME = "expertline"
LEASE_ROUTER = "serving.router.lease_router:LeaseRouter"
PROXY_LOCATION = ProxyLocation.EveryNode
_UNBOUNDED_ONGOING = 100_000  # admission is the router's business
_SOME_CPU = 0.01  # keeps a replica off a head that offers none: it outlives the head
_LEAVING_S = 10.0  # for an engine that has handed over what it could not finish
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


def build(
    args: Settings | dict[str, Any], engine_class: type[Engine] = Engine
) -> serve.Application:
    """The application for these settings (a `Settings`, or the same tree as plain data)."""
    settings = args if isinstance(args, Settings) else Settings.model_validate(args)
    if settings.secret is not None:
        secret = settings.secret.get_secret_value().encode()
    else:
        secret = secrets.token_bytes(32)
    gpus = wants_gpus(settings)
    router = _router_deployment().bind(settings, secret)
    engine = _engine_deployment(settings, gpus, engine_class).bind(settings, secret, router, gpus)
    return _ingress_deployment(settings).bind(settings, secret, router, engine)


def wants_gpus(settings: Settings) -> bool:
    """Whether ranks are to run on GPUs: as set, or as this machine suggests."""
    if settings.gang.device == "auto":
        return torch.cuda.is_available()
    return settings.gang.device == "cuda"


def _router_deployment() -> serve.Deployment:
    return serve.deployment(
        name="Router",
        num_replicas=1,
        max_ongoing_requests=_UNBOUNDED_ONGOING,
        ray_actor_options={"num_cpus": _SOME_CPU},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=1,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )(Router)


def _engine_deployment(
    settings: Settings, gpus: bool, engine_class: type[Engine]
) -> serve.Deployment:
    return serve.deployment(
        name="Engine",
        num_replicas=settings.engine.replicas,
        max_ongoing_requests=_UNBOUNDED_ONGOING,
        ray_actor_options={"num_cpus": settings.engine.cpus},
        placement_group_bundles=bundles(settings, gpus),
        placement_group_strategy=settings.gang.placement,
        request_router_config=RequestRouterConfig(
            request_router_class=LEASE_ROUTER  # type: ignore[arg-type]  # a path will do
        ),
        max_constructor_retry_count=2,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=settings.engine.drain_timeout_s + _LEAVING_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=settings.engine.update_surge_percent,
        logging_config=_QUIET,
    )(engine_class)


def _ingress_deployment(settings: Settings) -> serve.Deployment:
    return serve.deployment(
        name="Ingress",
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=_UNBOUNDED_ONGOING,
        ray_actor_options={"num_cpus": _SOME_CPU},
        graceful_shutdown_timeout_s=settings.ingress.longest_stream_s,
        graceful_shutdown_wait_loop_s=0.1,
        max_surge_percent=100,  # a new one listens before an old one stops to
        logging_config=_QUIET,
    )(Ingress)
