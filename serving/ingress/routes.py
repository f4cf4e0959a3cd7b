"""The HTTP routes: OpenAI's, and those that operators need. Knows nothing of Serve."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serving.api.errors import (
    ApiError,
    on_api_error,
    on_exception,
    on_http_exception,
    validation_error,
)
from serving.api.types import ChatRequest, CompletionRequest
from serving.config import Settings
from serving.ingress.auth import ApiKeys
from serving.ingress.fleet import FleetClient
from serving.ingress.service import EventStream, GenerationService
from serving.telemetry.exporter import merge_expositions
from serving.telemetry.logs import get_logger
from serving.telemetry.metrics import Endpoint, IngressMetrics

log = get_logger("ingress")
Body = TypeVar("Body", bound=BaseModel)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SCRAPE_TIMEOUT_S = 2.0
_CLIENT_GONE = 499
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class Routes:
    """Handlers and what they share; `app` makes the ASGI application of them."""

    def __init__(
        self,
        settings: Settings,
        service: GenerationService,
        fleet: FleetClient,
        metrics: IngressMetrics,
    ) -> None:
        self._settings = settings
        self._service = service
        self._fleet = fleet
        self._metrics = metrics
        self._keys = ApiKeys(settings.ingress.api_keys_file)
        self._created = int(time.time())
        self._scraper = httpx.AsyncClient(timeout=_SCRAPE_TIMEOUT_S, trust_env=False)

    def app(self) -> FastAPI:
        api = FastAPI(title="Expertline", openapi_url=None)
        api.add_exception_handler(ApiError, on_api_error)
        api.add_exception_handler(HTTPException, on_http_exception)
        api.add_exception_handler(Exception, on_exception)
        api.add_api_route("/v1/completions", self.completions, methods=["POST"])
        api.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        api.add_api_route("/v1/models", self.models)
        api.add_api_route("/v1/models/{name:path}", self.model)
        api.add_api_route("/livez", self.livez)
        api.add_api_route("/readyz", self.readyz)
        api.add_api_route("/metrics", self.metrics)
        return api

    async def close(self) -> None:
        await self._scraper.aclose()

    async def completions(self, request: Request) -> Response:
        async def answer(body: CompletionRequest, tenant: str, request_id: str) -> Response:
            return await self._service.completions(body, tenant, request_id)

        return await self._generate(request, "completions", CompletionRequest, answer)

    async def chat(self, request: Request) -> Response:
        async def answer(body: ChatRequest, tenant: str, request_id: str) -> Response:
            return await self._service.chat(body, tenant, request_id)

        return await self._generate(request, "chat", ChatRequest, answer)

    async def models(self, request: Request) -> Response:
        self._keys.tenant(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request, name: str) -> Response:
        self._keys.tenant(request.headers.get("authorization"))
        if name != self._settings.model.served_name:
            raise ApiError(404, "The model does not exist.", "model", "model_not_found")
        return JSONResponse(self._model_card())

    async def livez(self) -> Response:
        """This process answers; says nothing of the model."""
        return PlainTextResponse("ok\n")

    async def readyz(self) -> Response:
        """A request would be served now."""
        if not self._fleet.ready:
            return PlainTextResponse("no engine is ready\n", status_code=503)
        return PlainTextResponse("ok\n")

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

    async def _generate(
        self,
        request: Request,
        endpoint: Endpoint,
        shape: type[Body],
        answer: Callable[[Body, str, str], Awaitable[Response]],
    ) -> Response:
        started = time.monotonic()
        request_id = _request_id(request)
        try:
            tenant = self._keys.tenant(request.headers.get("authorization"))
            body = _parse(shape, await self._read(request))
            response = await answer(body, tenant, request_id)
        except ApiError as error:
            response = error.response()
        except ClientDisconnect:  # before the body was complete
            response = Response(status_code=_CLIENT_GONE)
        except asyncio.CancelledError:
            self._metrics.answered(endpoint, _CLIENT_GONE, time.monotonic() - started)
            raise
        response.headers["x-request-id"] = request_id

        def answered() -> None:
            self._metrics.answered(endpoint, response.status_code, time.monotonic() - started)

        if isinstance(response, EventStream):
            response.owned.callback(answered)
        else:
            answered()
        return response

    async def _read(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too long."""
        limit = self._settings.ingress.max_body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"The body exceeds {limit} bytes.")
        return bytes(body)

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model.served_name,
            "object": "model",
            "created": self._created,
            "owned_by": "expertline",
            "max_model_len": self._fleet.max_request_tokens,
        }


def _parse(shape: type[Body], body: bytes) -> Body:
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False, include_context=False)
        raise validation_error(details) from None


def _request_id(request: Request) -> str:
    """The client's own id if it is harmless in a log, with a tail that makes it unique here."""
    given = request.headers.get("x-request-id", "")
    own = secrets.token_hex(12)
    return f"{given}-{own}" if _REQUEST_ID.fullmatch(given) else own
