"""The ingress: what clients see of Expertline.

A Serve deployment behind HAProxy, on CPUs, with a fixed number of replicas. Each replica can
serve any client; it holds no state but the streams that it is serving.
"""

import asyncio
import gc
from typing import Any

from fastapi import FastAPI
from ray import serve

from serving.config import Settings
from serving.ingress.fleet import FleetClient
from serving.ingress.routes import Routes
from serving.ingress.service import GenerationService
from serving.node import node_address
from serving.telemetry.exporter import MetricsExporter
from serving.telemetry.logs import setup_logging
from serving.telemetry.metrics import IngressMetrics, count_tasks, new_registry


@serve.ingress()
class Ingress:
    """Serve deployment: OpenAI-compatible HTTP. Serve asks it for its ASGI application."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, secret: bytes, router: Any, engines: Any
    ) -> None:
        setup_logging(settings.telemetry.log_level)
        registry = new_registry()
        count_tasks(registry, asyncio.get_running_loop())
        metrics = IngressMetrics(registry)
        ingress_id = serve.get_replica_context().replica_id.unique_id
        self._exporter = MetricsExporter(
            registry,
            node_address(settings),
            settings.telemetry.targets_directory,
            {"process": "ingress", "replica": ingress_id},
        )
        self._fleet = FleetClient(router, secret, ingress_id, self._exporter.address, settings)
        self._service = GenerationService(settings, self._fleet, engines, metrics)
        self._routes = Routes(settings, self._service, self._fleet, metrics)
        gc.collect()
        gc.freeze()  # half a million objects that would only make every later pause longer

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._routes.app()

    async def __del__(self) -> None:
        await self._fleet.close()
        await self._routes.close()
        self._service.close()
        self._exporter.close()
