"""What operators ask: is it alive, is it ready, which version, how is it doing."""

import asyncio
from importlib.metadata import version

import httpx
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serving.ingress.fleet import FleetClient
from serving.telemetry.exporter import merge_expositions
from serving.telemetry.logs import get_logger

log = get_logger("ingress")
_SCRAPE_TIMEOUT_S = 2.0
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class Operations:
    """Routes that need no API key."""

    def __init__(self, fleet: FleetClient) -> None:
        self._fleet = fleet
        self._scraper = httpx.AsyncClient(timeout=_SCRAPE_TIMEOUT_S, trust_env=False)

    def add_to(self, api: FastAPI) -> None:
        api.add_api_route("/livez", self.livez)
        api.add_api_route("/readyz", self.readyz)
        api.add_api_route("/health", self.readyz)
        api.add_api_route("/version", self.version)
        api.add_api_route("/metrics", self.metrics)

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
        return JSONResponse({"version": version("expertline")})

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
