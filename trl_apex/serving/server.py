"""Serve reward functions to trainers over HTTP, by FastAPI and uvicorn.

A request waits for its turn unread, is read and checked, joins the others that wait for the same reward (`batching.py`),
and is answered with one number or one cause per image.
"""

import asyncio
import hmac
import inspect
import json
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError('The reward server needs fastapi. Run `pip install "trl_apex[server]"`.') from error

from trl_apex import __version__
from trl_apex.redact import checked_secret, secret_from
from trl_apex.rewards.base import KEYWORDS, OF_TRAINING
from trl_apex.rewards.registry import load_rewards
from trl_apex.rewards.scoring import reward_name
from trl_apex.serving.batching import Job, ServedReward
from trl_apex.serving.client import LOOPBACK, TOKEN_VARIABLE
from trl_apex.serving.local import end_with
from trl_apex.serving.wire import MEDIA_TYPE, PROTOCOL, decode_images

SHORTEST_TOKEN = 16
MEBI = 2**20
RESERVED = {*KEYWORDS, "images", "self"}


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send; each must be positive. `max_queue` and `header_timeout` have no effect any more.

    `max_memory // max_body` requests are read at a time for one reward; the others wait, unread.
    """

    max_body: int = 64 * MEBI  # bytes of one request
    max_memory: int = 1024 * MEBI  # bytes of the bodies that are held for one reward
    max_images: int = 64  # of one request
    max_pixels: int = 2048 * 2048  # of one image
    max_prompt: int = 10_000  # characters of one prompt
    max_metadata: int = 4 * MEBI  # bytes of the header line
    max_queue: int | None = None
    max_connections: int = 512  # while more are open, requests are answered 503
    header_timeout: float | int | None = None
    body_timeout: float | int = 60.0  # seconds that a client may take to send the body, once it is its turn
    score_timeout: float | int = 300.0  # seconds that one call of a reward may take

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if value is not None and value <= 0:
                raise ValueError(f"`{bound.name}` must be positive. Found {value}. Pass a larger bound.")
            if value is not None and bound.name in ("max_queue", "header_timeout"):
                warnings.warn(f"`{bound.name}` has no effect any more. Leave it out.", FutureWarning, stacklevel=3)

    @property
    def requests(self) -> int:
        """Requests whose bodies are held for one reward at a time."""
        return max(1, self.max_memory // self.max_body)


def serve(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    host: str = "127.0.0.1",
    port: int = 8000,
    parent: int | None = None,
    **options: Any,
) -> None:
    """Run the server of [`make_server`] until `Ctrl-C`, SIGTERM or the end of process `parent`; finishes requests under way."""
    server = make_server(rewards, host, port, **options)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
            port = server.config.port = free.getsockname()[1]  # a free one, where 0 was given
    except (OSError, OverflowError) as error:
        raise RuntimeError(
            f"The reward server must be able to listen on {host}:{port}. Found it taken or not allowed "
            f"({getattr(error, 'strerror', None) or error}). Pass another `--port`."
        ) from error
    scheme, app = "https" if server.config.is_ssl else "http", cast(FastAPI, server.config.app)
    print(f"Serving {', '.join(app.state.rewards)} on {scheme}://{host}:{port} (stop with Ctrl-C)", flush=True)
    if parent is not None:
        threading.Thread(target=end_with, args=(parent, server), daemon=True).start()
    server.run()


def make_server(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    token_file: str | Path | None = None,
    limits: Limits | None = None,
    ssl_certfile: str | Path | None = None,
    ssl_keyfile: str | Path | None = None,
    **options: Any,
) -> uvicorn.Server:
    """The server, bound to nothing yet; `run()` serves until it is told to stop.

    Args:
        rewards, limits, options: See [`build_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on; other than loopback needs a token.
        port (`int`, *optional*, defaults to `8000`): Port to listen on; 0 for any free one.
        token, token_file (`str`, *optional*): Bearer token, or the file that holds it; see [`read_token`].
        ssl_certfile, ssl_keyfile (`str`, *optional*): Certificate, to serve https, and its key where it is another file.
    """
    token = read_token(token, token_file)
    if host not in LOOPBACK and token is None:
        raise ValueError(
            f"A reward server on an address that others reach must have a token. Found none for {host}. Set "
            f"{TOKEN_VARIABLE} or pass `--token-file`, or listen on 127.0.0.1."
        )
    limits = limits or Limits()
    config = uvicorn.Config(
        build_app(rewards, token, limits, **options),
        host=host,
        port=port,
        http="h11",
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        h11_max_incomplete_event_size=16 * 1024,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    return uvicorn.Server(config)


def read_token(token: str | None = None, token_file: str | Path | None = None) -> str | None:
    """The bearer token, of at least 16 characters: as given, else from the file, else from `TRL_APEX_REWARD_TOKEN`, else None."""
    if token is not None:
        found = checked_secret(token, "`token`")
    elif token_file is not None:
        found = checked_secret(Path(token_file).read_text(), f"the file {token_file}")
    elif TOKEN_VARIABLE not in os.environ:
        return None
    else:
        found = secret_from(TOKEN_VARIABLE) or ""
    if len(found) < SHORTEST_TOKEN:
        raise ValueError(
            f"The token must have at least {SHORTEST_TOKEN} ASCII characters and no spaces. Found {len(found)} "
            'characters. Make one with `python -c "import secrets; print(secrets.token_urlsafe())"`.'
        )
    return found


def build_app(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    token: str | None = None,
    limits: Limits | None = None,
    max_batch: int = 64,
    batch_wait: float | int = 0.002,
) -> FastAPI:
    """The server as an ASGI application.

    Without a token only programs on this machine may ask: a request must name a loopback host and carry no `Origin`,
    which a web page that the user has open would.

    Args:
        rewards (`Mapping[str, Callable]` or `Sequence[Callable | str]`): Functions by name, or as [`load_rewards`] takes them.
        token (`str`, *optional*): Bearer token that every request but `GET /health` must carry.
        limits ([`Limits`], *optional*): Bounds on what clients may send.
        max_batch, batch_wait: See [`ServedReward`].
    """
    limits = limits or Limits()
    served = {
        name: ServedReward(name, func, limits.requests, limits.score_timeout, max_batch, batch_wait)
        for name, func in named_rewards(rewards).items()
    }

    def trusted(request: Request) -> bool:
        if token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

    async def guard(request: Request) -> None:
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if token is None and (host not in LOOPBACK or "origin" in request.headers):
            raise refuse(403, "without a token, only programs on this machine may ask")
        if request.url.path != "/health" and not trusted(request):
            raise refuse(401, "the bearer token is missing or wrong", **{"WWW-Authenticate": "Bearer"})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = [asyncio.create_task(reward.load()) for reward in served.values()]
        yield
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await asyncio.gather(*(reward.close() for reward in served.values()))

    app = FastAPI(
        title="trl_apex reward server",
        version=__version__,
        description="Scores images. Nothing that a client sends is ever unpickled.",
        lifespan=lifespan,
        dependencies=[Depends(guard)],
        openapi_url=None,
    )
    app.state.rewards = served
    strangers = refusals(401, 403)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    @app.get("/health", responses=refusals(403, 503))
    async def health(request: Request) -> JSONResponse:
        """Version and states; 503 until every reward is ready. Needs no token, and with it tells causes and models."""
        states = [reward.describe(trusted(request)) for reward in served.values()]
        found = {reward.state.partition(":")[0] for reward in served.values()}
        status = next((state for state in ("failed", "loading") if state in found), "ready")
        told = {"status": status, "version": app.version, "protocol": PROTOCOL, "rewards": states}
        return JSONResponse(told, 200 if status == "ready" else 503)

    @app.get("/metrics", responses=strangers)
    async def metrics() -> dict[str, dict[str, float]]:
        """Counters by reward: images, missing rewards, seconds, requests by status, and images that wait."""
        return {name: {**reward.counts, "waiting": reward.waiting} for name, reward in served.items()}

    @app.get("/v1/rewards", responses=strangers)
    async def listing() -> list[dict[str, str]]:
        """The rewards that this server has."""
        return [reward.describe(True) for reward in served.values()]

    @app.post("/v1/offload/{name:path}", status_code=204, responses=refusals(401, 403, 404))
    async def offload(name: str) -> None:
        """Move a reward's network to the CPU until the next request."""
        if name not in served:
            raise refuse(404, f"there is no such reward; there are {', '.join(served)}")
        await served[name].offload()

    @app.post("/v1/rewards/{name:path}", responses=refusals(*REFUSALS), openapi_extra={"requestBody": BODY})
    async def score(name: str, request: Request) -> RewardAnswer:
        """Score images against their prompts."""
        if name not in served:
            raise refuse(404, f"there is no such reward; there are {', '.join(served)}")
        reward = served[name]
        try:
            answer = await answer_request(reward, request, limits)
        except HTTPException as error:
            reward.counts[f"requests_{error.status_code}"] += 1
            raise
        reward.counts["requests_200"] += 1
        reward.counts["images"] += len(answer.rewards)
        reward.counts["missing"] += sum(error is not None for error in answer.errors)
        reward.counts["seconds"] += answer.seconds  # type: ignore[assignment]
        return answer

    return app


class RewardAnswer(BaseModel):
    """The rewards of a request."""

    rewards: list[float | None] = Field(description="One per image; null where there is none.")
    errors: list[str | None] = Field(description="Why a reward is null, if something broke.")
    seconds: float = Field(description="Time from the turn of the request to its answer.")


REFUSALS = (400, 401, 403, 404, 408, 411, 413, 415, 422, 500, 503)
BODY = {
    "required": True,
    "description": "A line of JSON, then the raw RGB bytes of all images; see `trl_apex/serving/wire.py`.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Refusals for the OpenAPI document."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


def refuse(status: int, detail: str, **headers: str) -> HTTPException:
    """A refusal. uvicorn discards the rest of the body, so that a client that still sends gets to read the answer."""
    return HTTPException(status, detail, headers)


async def answer_request(reward: ServedReward, request: Request, limits: Limits) -> RewardAnswer:
    """Wait for a turn, read the body, and have it scored, or refuse with the cause."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MEDIA_TYPE:
        hint = " trl_apex 0.1 sends that; use one release on both sides." if kind == "multipart/form-data" else ""
        raise refuse(415, f"the body must be {MEDIA_TYPE}, protocol {PROTOCOL}. Found {kind[:100]!r}.{hint}")
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        raise refuse(411, "the body must have a Content-Length")
    if int(length) > limits.max_body:
        raise refuse(413, f"the body must have at most {limits.max_body} bytes", Connection="close")
    check_state(reward)
    async with reward.bodies:
        check_state(reward)
        started = time.perf_counter()
        job = parse_body(await read_body(request, int(length), limits), limits)
        scored = await reward.score(job)
    rewards = [None if math.isnan(value) else value for value in scored]
    return RewardAnswer(rewards=rewards, errors=scored.errors, seconds=time.perf_counter() - started)


def check_state(reward: ServedReward) -> None:
    """Refuse a request for a reward that cannot score: 503 while it loads, 500 if it failed."""
    if reward.state == "loading":
        raise refuse(503, "the reward is not ready: loading", **{"Retry-After": "1"})
    if reward.state != "ready":
        raise refuse(500, f"the reward is not ready: {reward.state}")


async def read_body(request: Request, length: int, limits: Limits) -> bytearray:
    """The body of a request, of as many bytes as announced, unless it is too slow or the client leaves."""
    body, filled = bytearray(length), 0  # once and for all: growing would leave holes in the memory
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.stream():
                body[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
    except TimeoutError:
        raise refuse(408, f"the body must arrive within {limits.body_timeout:g} s", Connection="close") from None
    except ClientDisconnect:
        raise refuse(400, "the client left") from None
    return body


class Header(BaseModel):
    """The first line of a request's body, as `wire.py` describes it; the images' bytes follow."""

    model_config = ConfigDict(extra="forbid")
    prompts: list[str] = Field(min_length=1)
    columns: dict[str, list[Any]] = {}
    dtype: Literal["uint8", "float32"] = "uint8"
    sizes: list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]]
    floats: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Header":
        for key, values in self.columns.items():
            if key in RESERVED:
                raise ValueError(f"the column name {key!r} is reserved")
            if len(values) != len(self.prompts):
                raise ValueError(f"column {key!r} must hold {len(self.prompts)} values, found {len(values)}")
        if len(self.sizes) != len(self.prompts):
            raise ValueError(f"there must be one image per prompt: {len(self.prompts)}, found {len(self.sizes)}")
        if self.dtype == "float32" and not self.floats:
            raise ValueError("float32 images must have `floats`")
        if self.floats and any(size != self.sizes[0] for size in self.sizes):
            raise ValueError("with `floats`, all images must have one size")
        return self


def parse_body(body: bytearray, limits: Limits) -> Job:
    """A request's images and columns, with every bound checked.

    Example:
        >>> parse_body(bytearray(b'{"prompts": ["a cat"], "sizes": [[1, 1]]}\\nRGB'), Limits()).arrays[0].tolist()
        [[[82, 71, 66]]]
    """
    end = body.find(b"\n", 0, limits.max_metadata + 1)
    if end < 0:
        raise refuse(413 if len(body) > limits.max_metadata else 400, "the body must begin with a line of JSON")
    try:
        value = json.loads(bytes(body[:end]))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # NaN, infinities and half surrogates end here
    except (ValueError, RecursionError) as error:
        raise refuse(400, f"the header line must be JSON: {type(error).__name__}") from None
    try:
        header = Header.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        raise refuse(422, f"the header is not as it must be at `{place}`: {first['msg'][:200]}") from None
    if len(header.prompts) > limits.max_images:
        raise refuse(413, f"a request must have at most {limits.max_images} images")
    if max(map(len, header.prompts)) > limits.max_prompt:
        raise refuse(413, f"a prompt must have at most {limits.max_prompt} characters")
    if max(map(math.prod, header.sizes)) > limits.max_pixels:
        raise refuse(413, f"an image must have at most {limits.max_pixels} pixels")
    try:
        arrays = decode_images(memoryview(body)[end + 1 :], header.dtype, header.sizes)
    except ValueError as error:
        raise refuse(422, str(error)) from None
    return Job(header.prompts, arrays, header.columns, header.floats)


def named_rewards(rewards: Mapping[str, Callable] | Sequence[Callable | str]) -> dict[str, Callable]:
    """Reward functions by objective name."""
    if not isinstance(rewards, Mapping):
        functions = load_rewards(rewards)
        names = [reward_name(func) for func in functions]
        if len(set(names)) < len(names):
            raise ValueError(f"Each reward must have a name of its own. Found {names}. Pass `name=` to one of them.")
        rewards = dict(zip(names, functions, strict=True))
    if not rewards:
        raise ValueError("A reward server must have a reward. Found none. Pass `--reward ocr`, for example.")
    for name, func in rewards.items():
        try:
            parameters = inspect.signature(func).parameters
        except (TypeError, ValueError):  # a builtin
            continue
        needed = [
            key for key in OF_TRAINING if key in parameters and parameters[key].default is inspect.Parameter.empty
        ]
        if needed:
            raise ValueError(
                f"A reward on a server must not need what only a trainer has. Found {', '.join(needed)} in `{name}`. Give "
                "them a default, or run this reward in the trainer."
            )
    return dict(rewards)
