"""One try at a generation on one engine: a lease, an inbox, and the call that stays open.

Tokens come over the engine's stream; the unary Serve call beside it stays open for as long as
the try lasts, so that Serve counts the request, drains for it, and reports the death of what
serves it.
"""

import asyncio
from typing import Any

from serving.api.errors import ApiError
from serving.engine.prefix import page_hashes
from serving.engine.request import Request
from serving.fleet import GenerateCall, LeaseRequest
from serving.ingress.fleet import FleetClient
from serving.ingress.inbox import EngineLost, Inbox
from serving.telemetry.logs import get_logger

log = get_logger("generation")


class Attempt:
    """A request on its way to one engine, or there; whoever starts it closes it, whatever comes.

    Args:
        request: its id belongs to this try alone, so that nothing of another one is taken for it.
    """

    def __init__(self, request: Request, fleet: FleetClient, engines: Any) -> None:
        self.request = request
        self.inbox = Inbox()
        self.engine_id: str | None = None
        self._fleet = fleet
        self._engines = engines
        self._call: asyncio.Task[None] | None = None

    async def start(self, deadline_s: float, avoid: str = "", continued: bool = False) -> None:
        """Acquires a lease and sets the engine to work.

        Args:
            deadline_s: longest wait for the lease.
            avoid: an engine that should not be the one.
            continued: the request was admitted before.

        Raises:
            ApiError: there is no lease for it.
        """
        request = self.request
        self.inbox = self._fleet.open(request.id)
        lease = LeaseRequest(
            request_id=request.id,
            tenant=request.tenant,
            priority=request.priority,
            prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
            page_hashes=page_hashes(request.prompt, request.cache_scope),
            deadline_s=deadline_s,
            avoid=avoid,
            continued=continued,
        )
        self.engine_id = await self._fleet.acquire(lease)
        self._call = asyncio.create_task(self._hold_call(self.engine_id))

    def close(self, finished: bool) -> None:
        """Ends whatever was held; cancels the engine's work unless that has finished."""
        self._fleet.close_request(self.request.id, self.engine_id, finished)
        if self._call is not None and not finished:
            self._call.cancel()

    async def _hold_call(self, engine_id: str) -> None:
        """Keeps the unary call open; its failure is the try's failure."""
        handle = self._engines.options(session_id=engine_id)
        response = handle.generate.remote(GenerateCall.of(self._fleet.ingress_id, self.request))
        try:
            refusal = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # Ray's and Serve's errors have no common base
            log.event("WARNING", "engine.call_failed", error=type(error).__name__)
            self.inbox.fail(EngineLost("failed"))
            return
        if refusal is not None:
            self.inbox.fail(ApiError(400, refusal))
