"""Every endpoint in one table: what the routes serve, the OpenAPI document and the README say."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from serving.api import schemas
from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.messages import CountTokensRequest, MessagesRequest
from serving.api.responses import ResponsesRequest
from serving.api.tokens import DetokenizeRequest, TokenizeRequest


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path.

    Attributes:
        name: of the handler.
        answer: shape of a 200; None for plain text.
        streams: whether `stream: true` answers with events.
        errors: statuses besides 200 that it may answer with.
        public: it needs no API key.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    name: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    error: type[BaseModel] = schemas.ErrorBody
    streams: bool = False
    errors: tuple[int, ...] = ()
    public: bool = False


_BODY = (400, 401, 404, 413)
_GENERATION = (*_BODY, 429, 500, 503)

ENDPOINTS = (
    Endpoint("POST", "/v1/completions", "completions", "Complete a text, or fill in its middle",
             CompletionRequest, schemas.Completion, streams=True, errors=_GENERATION),
    Endpoint("POST", "/v1/chat/completions", "chat", "Answer a conversation",
             ChatRequest, schemas.ChatCompletion, streams=True, errors=_GENERATION),
    Endpoint("POST", "/v1/responses", "responses", "Answer in the newer of OpenAI's dialects",
             ResponsesRequest, schemas.Response, streams=True, errors=_GENERATION),
    Endpoint("GET", "/v1/responses/{name}", "stored_response", "A response that was stored",
             answer=schemas.Response, errors=(401, 404)),
    Endpoint("DELETE", "/v1/responses/{name}", "delete_response", "Forget a stored response",
             answer=schemas.Deleted, errors=(401, 404)),
    Endpoint("POST", "/v1/messages", "messages", "Answer in Anthropic's dialect",
             MessagesRequest, schemas.Message, schemas.MessagesErrorBody, True, _GENERATION),
    Endpoint("POST", "/v1/messages/count_tokens", "count_tokens", "Length of a conversation",
             CountTokensRequest, schemas.InputTokens, schemas.MessagesErrorBody, errors=_BODY),
    Endpoint("GET", "/v1/models", "models", "The models that are served",
             answer=schemas.Models, errors=(401,)),
    Endpoint("GET", "/v1/models/{name}", "model", "One model",
             answer=schemas.Model, errors=(401, 404)),
    Endpoint("POST", "/tokenize", "tokenize", "Token ids of a text or a conversation",
             TokenizeRequest, schemas.Tokens, errors=_BODY),
    Endpoint("POST", "/detokenize", "detokenize", "The text of token ids",
             DetokenizeRequest, schemas.Text, errors=_BODY),
    Endpoint("GET", "/tokenizer_info", "tokenizer_info", "Special tokens and the chat template",
             answer=schemas.TokenizerInfo, errors=(401,)),
    Endpoint("GET", "/health", "readyz", "Whether a request would be served now",
             errors=(503,), public=True),
    Endpoint("GET", "/readyz", "readyz", "Whether a request would be served now",
             errors=(503,), public=True),
    Endpoint("GET", "/livez", "livez", "Whether this process answers",
             public=True),
    Endpoint("GET", "/version", "version", "The server's version",
             answer=schemas.Version, public=True),
    Endpoint("GET", "/metrics", "metrics", "Prometheus metrics of the whole fleet",
             public=True),
)  # fmt: skip
