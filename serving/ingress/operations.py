"""What operators ask: is it alive, is it ready, which version, how is it doing."""

import asyncio
import json
from importlib.metadata import version

import httpx
from starlette.responses import PlainTextResponse, Response

from serving.api.json_response import JsonResponse
from serving.api.openapi import document
from serving.ingress.fleet import FleetClient
from serving.telemetry.exporter import merge_expositions
from serving.telemetry.logs import get_logger

log = get_logger("ingress")
_SCRAPE_TIMEOUT_S = 5.0  # half of what Prometheus itself waits for an answer
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class Operations:
    """Routes that need no API key."""

    def __init__(self, fleet: FleetClient) -> None:
        self._fleet = fleet
        self._scraper = httpx.AsyncClient(timeout=_SCRAPE_TIMEOUT_S, trust_env=False)
        self._version = version("expertline")
        self._openapi = json.dumps(document(self._version)).encode()

    async def close(self) -> None:
        await self._scraper.aclose()

    async def livez(self) -> Response:
        """This process answers; says nothing of the model."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> Response:
        """A request would be served now."""
        if not self._fleet.ready:
            return PlainTextResponse("no engine is ready\n", status_code=503)
        return PlainTextResponse("ok\n")

    async def version(self) -> Response:
        return JsonResponse({"version": self._version})

    async def openapi(self) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def metrics(self) -> Response:
        """Metrics of the whole fleet, each process's under its own `instance`."""
        addresses = self._fleet.metrics_addresses
        texts = await asyncio.gather(*(self._scrape(address) for address in addresses))
        return PlainTextResponse(merge_expositions(texts), media_type=_EXPOSITION)

    async def _scrape(self, address: str) -> tuple[dict[str, str], str]:
        try:
            response = await self._scraper.get(f"http://{address}/metrics")
        except httpx.HTTPError as error:
            log.event("INFO", "scrape.failed", target=address, error=type(error).__name__)
            return {"instance": address}, ""
        return {"instance": address}, response.text
