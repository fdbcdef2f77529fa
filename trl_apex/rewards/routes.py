"""The reward server's four addresses."""

import asyncio
import math
import time
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from trl_apex.rewards.batching import Job, QueueFull
from trl_apex.rewards.request_parsing import ParsedRequest, parse_request
from trl_apex.rewards.request_schema import Health, Refusal, RewardAnswer, RewardMetadata, RewardState, request_body
from trl_apex.rewards.server_state import ServerState

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "No well-formed multipart or JSON."},
    401: {"model": Refusal, "description": "The bearer token is missing or wrong."},
    403: {"model": Refusal, "description": "Without a token: not from this machine, or from a web page."},
    404: {"model": Refusal, "description": "No such reward."},
    408: {"model": Refusal, "description": "The body came too slowly."},
    413: {"model": Refusal, "description": "Too large."},
    415: {"model": Refusal, "description": "Not multipart/form-data."},
    422: {"model": Refusal, "description": "Well-formed, but not a request for rewards."},
    503: {"model": Refusal, "description": "Loading, broken or busy; `Retry-After` where it may pass."},
    504: {"model": Refusal, "description": "Scoring took too long."},
}


def add_routes(app: FastAPI, state: ServerState) -> None:
    """Add `/health`, `/metrics`, `/v1/rewards` and `/v1/rewards/{name}`.

    Args:
        app (`FastAPI`): The application.
        state ([`ServerState`]): Its state.
    """
    strangers: dict[int | str, dict[str, Any]] = {key: REFUSALS[key] for key in (401, 403)}

    @app.get("/health", response_model=Health, responses={503: {"model": Health}, 403: REFUSALS[403]})
    async def health() -> JSONResponse:
        """Model, version and readiness; 503 until every reward is ready. Needs no token."""
        found = state.health()
        return JSONResponse(found.model_dump(), 200 if found.status == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse, responses=strangers)
    async def metrics() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(state.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/rewards", responses=strangers)
    async def rewards() -> list[RewardState]:
        """The rewards that this server has."""
        return state.health().rewards

    @app.post(
        "/v1/rewards/{name}",
        response_model=RewardAnswer,
        responses=REFUSALS,
        openapi_extra={"requestBody": request_body("#/components/schemas/RewardMetadata")},
    )
    async def score(name: str, request: Request) -> RewardAnswer:
        """Score images against their prompts. A broken image costs its own reward alone."""
        if name not in state.functions:
            raise HTTPException(404, f"there is no such reward; there are {', '.join(state.functions)}")
        started = time.perf_counter()
        status = 200
        try:
            answer = await _score(state, name, request)
        except HTTPException as error:
            status = error.status_code
            raise
        except ClientDisconnect:
            status = 499
            raise
        finally:
            state.count("requests_total", name, str(status))
            state.count("seconds_total", name, by=time.perf_counter() - started)
        state.count("images_total", name, by=len(answer.rewards))
        state.count("missing_total", name, by=sum(error is not None for error in answer.errors))
        return answer

    _publish(app)


async def _score(state: ServerState, name: str, request: Request) -> RewardAnswer:
    readiness = state.states[name]
    if readiness != "ready":
        headers = {"Retry-After": "2"} if readiness == "loading" else None
        raise HTTPException(503, f"the reward is not ready: {readiness}", headers)
    parsed = await parse_request(request, state.limits)
    job, places, broken = make_job(parsed)
    rewards: list[float | None] = [None] * len(parsed.metadata.prompts)
    errors: list[str | None] = [broken.get(i) for i in range(len(rewards))]
    seconds = 0.0
    if places:
        try:
            scored = await asyncio.wait_for(state.batchers[name].score(job), state.limits.score_timeout)
        except QueueFull:
            raise HTTPException(503, "too many images wait for this reward", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"no rewards within {state.limits.score_timeout:g} s") from None
        seconds = scored.seconds
        for place, reward, error in zip(places, scored.rewards, scored.errors, strict=True):
            rewards[place], errors[place] = (None if math.isnan(reward) else reward), error
    return RewardAnswer(rewards=rewards, errors=errors, seconds=seconds)


def make_job(parsed: ParsedRequest) -> tuple[Job, list[int], dict[int, str]]:
    """A job of a request's whole samples, their places, and the cause of each broken one.

    Args:
        parsed ([`ParsedRequest`]): The request.

    Returns:
        `tuple[Job, list[int], dict[int, str]]`.
    """
    metadata = parsed.metadata
    if isinstance(parsed.images, Tensor):
        return Job(metadata.prompts, parsed.images, metadata.columns), list(range(len(metadata.prompts))), {}
    broken = {i: image for i, image in enumerate(parsed.images) if isinstance(image, str)}
    places = [i for i in range(len(parsed.images)) if i not in broken]
    return (
        Job(
            [metadata.prompts[i] for i in places],
            [image for image in parsed.images if not isinstance(image, str)],
            {key: [values[i] for i in places] for key, values in metadata.columns.items()},
        ),
        places,
        broken,
    )


def _publish(app: FastAPI) -> None:
    """Add to the OpenAPI document what FastAPI cannot see: the request's JSON part and the bearer token."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "RewardMetadata" not in schemas:
            schema = RewardMetadata.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas["RewardMetadata"] = schema
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}, {}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
