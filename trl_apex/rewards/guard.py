"""What stands between the network and the reward server: who may ask, how much, and how slowly."""

import asyncio
import hmac
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trl_apex.rewards.limits import Limits, MemoryBudget, OutOfMemoryBudget

CLOSE = {"Connection": "close"}
BUSY = {"Connection": "close", "Retry-After": "1"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Middleware that refuses strangers before it reads what they send, and bounds what anyone may send.

    Without a token the server listens on loopback only, where web pages that the user has open are the strangers: a
    request must then name a loopback host and carry no `Origin`.

    Args:
        app (`ASGIApp`): What comes behind.
        token (`str`, *optional*): The bearer token; None for no token.
        limits ([`Limits`]): The bounds.
        budget ([`MemoryBudget`]): Counts the bytes of all requests.
    """

    def __init__(self, app: ASGIApp, token: str | None, limits: Limits, budget: MemoryBudget) -> None:
        self.app, self.limits, self.budget = app, limits, budget
        self.token = token.encode() if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        share = self.budget.share()
        scope["memory_share"] = share
        try:
            await self.app(scope, self._bounded(receive, share), send)
        except ClientDisconnect:  # nobody is left to answer
            pass
        finally:
            share.give_back()

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.token is None:
            host = hostname(headers.get("host", ""))
            if host not in LOOPBACK or "origin" in headers:
                return answer(403, "without a token, only programs on this machine may ask")
        elif path != "/health":
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.token):
                return answer(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.max_body:
            return answer(413, f"the body must have at most {self.limits.max_body} bytes")
        return None

    def _bounded(self, receive: Receive, share: Any) -> Receive:
        deadline, received = time.monotonic() + self.limits.body_timeout, 0
        complete = False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(
                    408, f"the body must arrive within {self.limits.body_timeout:g} s", CLOSE
                ) from None
            size = len(message.get("body", b""))
            received += size
            complete = not message.get("more_body", False)
            if received > self.limits.max_body:
                raise HTTPException(413, f"the body must have at most {self.limits.max_body} bytes", CLOSE)
            try:
                share.take(size)
            except OutOfMemoryBudget:
                raise HTTPException(503, "the server holds too many requests", BUSY) from None
            return message

        return bounded


def hostname(host: str) -> str:
    """The name in a `Host` header, without the port.

    Example:

    ```python
    >>> from trl_apex.rewards.guard import hostname
    >>> hostname("localhost:8000"), hostname("[::1]:8000"), hostname("[broken")
    ('localhost', '::1', '')

    ```
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A refusal, after which the connection closes, since the rest of the request is not read."""
    return JSONResponse({"detail": detail}, status, headers=CLOSE | (headers or {}))


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a bound on the time between a connection and the end of a request's head.

    uvicorn itself bounds neither, so that clients who send one byte a minute would hold connections for ever.
    """

    header_timeout = 10.0
    max_connections = 512

    def connection_made(self, transport: Any) -> None:  # uvloop has a transport class of its own
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > 2 * self.max_connections:
            transport.abort()
            return
        if len(self.connections) > self.max_connections:
            # uvicorn's own limit would refuse every client while there are too many; here the first ones are served.
            self.app = answer(503, "too many connections", BUSY)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Run the timer whenever no request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.header_timeout, self.transport.abort)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def guarded_protocol(limits: Limits) -> type[GuardedProtocol]:
    """The protocol with these bounds."""
    bounds = {"header_timeout": limits.header_timeout, "max_connections": limits.max_connections}
    return type("BoundedProtocol", (GuardedProtocol,), bounds)
