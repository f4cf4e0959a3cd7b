"""The HTTP routes: OpenAI's, and those that operators need. Knows nothing of Serve."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.endpoints import ENDPOINTS
from serving.api.errors import (
    ApiError,
    on_api_error,
    on_exception,
    on_http_exception,
    refusal,
)
from serving.api.json_response import JsonResponse
from serving.api.messages import CountTokensRequest, MessagesRequest
from serving.api.messages_answer import MessagesAnswer, messages_error
from serving.api.response_store import ResponseStore, delete_response, stored_response
from serving.api.responses import ResponsesRequest
from serving.api.responses_answer import ResponsesAnswer
from serving.api.tokens import DetokenizeRequest, TokenizeRequest
from serving.config import Settings
from serving.ingress.auth import ApiKeys
from serving.ingress.console import add_console
from serving.ingress.fleet import FleetClient
from serving.ingress.operations import Operations
from serving.ingress.service import GenerationService, Origin
from serving.ingress.streams import DirectSend, EventStream
from serving.telemetry.metrics import Endpoint, IngressMetrics

Body = TypeVar("Body", bound=BaseModel)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_GONE = 499


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
        self._operations = Operations(fleet)
        self._store = _response_store(settings)

    def app(self) -> FastAPI:
        api = FastAPI(title="Expertline", openapi_url=None)
        api.add_middleware(DirectSend)
        api.add_exception_handler(ApiError, on_api_error)
        api.add_exception_handler(HTTPException, on_http_exception)
        api.add_exception_handler(Exception, on_exception)
        for endpoint in ENDPOINTS:
            owner = self if hasattr(self, endpoint.name) else self._operations
            path = endpoint.path.replace("{name}", "{name:path}")  # a model's may hold slashes
            handler = getattr(owner, endpoint.name)
            api.add_api_route(path, handler, methods=[endpoint.method])
        api.add_api_route("/openapi.json", self._operations.openapi)
        add_console(api)
        return api

    async def close(self) -> None:
        await self._operations.close()

    async def completions(self, request: Request) -> Response:
        return await self._answer(
            request, "completions", CompletionRequest, self._service.completions
        )

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", ChatRequest, self._service.chat)

    async def responses(self, request: Request) -> Response:
        async def answer(body: ResponsesRequest, origin: Origin) -> Response:
            chat = body.chat(self._store, origin.tenant)
            shape = ResponsesAnswer(
                origin.request_id,
                self._service.check_model(body.model),
                self._service.tokenizer,
                body,
                chat,
                self._store,
                origin.tenant,
            )
            return await self._service.chat(chat, origin, shape)

        return await self._answer(request, "responses", ResponsesRequest, answer)

    async def stored_response(self, request: Request, name: str) -> Response:
        return JsonResponse(stored_response(self._store, self._tenant(request), name))

    async def delete_response(self, request: Request, name: str) -> Response:
        return JsonResponse(delete_response(self._store, self._tenant(request), name))

    async def messages(self, request: Request) -> Response:
        async def answer(body: MessagesRequest, origin: Origin) -> Response:
            model = self._service.check_model(body.model)
            shape = MessagesAnswer(origin.request_id, model, self._service.tokenizer, body)
            return await self._service.chat(body.chat(), origin, shape)

        return await self._answer(request, "messages", MessagesRequest, answer, messages_error)

    async def count_tokens(self, request: Request) -> Response:
        async def answer(body: CountTokensRequest, origin: Origin) -> Response:
            self._service.check_model(body.model)
            ids = await self._service.chat_prompt(body.chat())
            return JsonResponse({"input_tokens": len(ids)})

        return await self._answer(request, "other", CountTokensRequest, answer, messages_error)

    async def tokenize(self, request: Request) -> Response:
        async def answer(body: TokenizeRequest, origin: Origin) -> Response:
            ids = await self._tokenized(body)
            answer: dict[str, Any] = {
                "count": len(ids),
                "max_model_len": self._fleet.max_request_tokens,
                "tokens": ids,
            }
            if body.return_token_strs:
                answer["token_strs"] = await asyncio.to_thread(self._strings, ids)
            return JsonResponse(answer)

        return await self._answer(request, "other", TokenizeRequest, answer)

    async def detokenize(self, request: Request) -> Response:
        async def answer(body: DetokenizeRequest, origin: Origin) -> Response:
            tokenizer = self._service.tokenizer
            if body.tokens and max(body.tokens) >= tokenizer.vocab_size:
                raise ApiError(400, "A token id is outside the vocabulary.", "tokens")
            text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
            return JsonResponse({"prompt": text})

        return await self._answer(request, "other", DetokenizeRequest, answer)

    async def tokenizer_info(self, request: Request) -> Response:
        self._tenant(request)
        tokenizer = self._service.tokenizer
        special = {token: text for text, token in tokenizer.special_tokens.items()}
        return JsonResponse(
            {
                "add_bos_token": tokenizer.adds_bos,
                "bos_token": special.get(tokenizer.bos_id),
                "bos_token_id": tokenizer.bos_id,
                "eos_token": special.get(tokenizer.eos_id),
                "eos_token_id": tokenizer.eos_id,
                "vocab_size": tokenizer.vocab_size,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def models(self, request: Request) -> Response:
        self._tenant(request)
        return JsonResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request, name: str) -> Response:
        self._tenant(request)
        self._service.check_model(name)
        return JsonResponse(self._model_card())

    async def _tokenized(self, body: TokenizeRequest) -> list[int]:
        served = self._settings.model.served_name
        if body.model is not None:
            self._service.check_model(body.model)
        if body.prompt is None:
            return await self._service.chat_prompt(body.chat(served))
        if body.add_special_tokens:
            return await self._service.prompts.completion(body.prompt)
        return await self._service.prompts.encode([body.prompt], "prompt")

    def _strings(self, ids: list[int]) -> list[str]:
        tokenizer = self._service.tokenizer
        return [tokenizer.decode([token], skip_special=False) for token in ids]

    def _tenant(self, request: Request) -> str:
        headers = request.headers
        return self._keys.tenant(headers.get("authorization"), headers.get("x-api-key"))

    async def _answer(
        self,
        request: Request,
        endpoint: Endpoint,
        shape: type[Body],
        answer: Callable[[Body, Origin], Awaitable[Response]],
        refuse: Callable[[ApiError], Response] = ApiError.response,
    ) -> Response:
        """What every endpoint with a body does around its own work.

        Args:
            refuse: makes the answer of a request that failed before its first byte.
        """
        started = time.monotonic()
        request_id = _request_id(request)
        try:
            tenant = self._tenant(request)
            body = _parse(shape, await self._read(request))
            response = await answer(body, Origin(tenant, request_id))
        except ApiError as error:
            response = refuse(error)
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


def _response_store(settings: Settings) -> ResponseStore | None:
    ingress = settings.ingress
    if not ingress.stored_responses:
        return None
    return ResponseStore(
        ingress.stored_responses, ingress.stored_bytes, ingress.stored_s, time.monotonic
    )


def _parse(shape: type[Body], body: bytes) -> Body:
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def _request_id(request: Request) -> str:
    """The client's own id if it is harmless in a log, with a tail that makes it unique here."""
    given = request.headers.get("x-request-id", "")
    own = secrets.token_hex(12)
    return f"{given}-{own}" if _REQUEST_ID.fullmatch(given) else own
