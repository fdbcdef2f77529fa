"""Serve reward functions to trainers over HTTP."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from trl_apex.rewards.by_name import load_reward
from trl_apex.rewards.calling import reward_name
from trl_apex.rewards.limits import Limits

TOKEN_VARIABLE = "TRL_APEX_REWARD_TOKEN"
SHORTEST_TOKEN = 16
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def read_token(token: str | None = None, token_file: str | Path | None = None) -> str | None:
    """The bearer token: as given, else from the file, else from the variable `TRL_APEX_REWARD_TOKEN`, else None.

    Args:
        token (`str`, *optional*): The token.
        token_file (`str` or `Path`, *optional*): A file that holds nothing else.

    Returns:
        `str` or None.

    Raises:
        ValueError: If the token is shorter than 16 characters or not plain ASCII.
    """
    if token is None and token_file is not None:
        token = Path(token_file).read_text().strip()
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(character.isspace() for character in token):
        raise ValueError(
            f"The token must have at least {SHORTEST_TOKEN} ASCII characters and no spaces. Found {len(token)} "
            'characters. Make one with `python -c "import secrets; print(secrets.token_urlsafe())"`.'
        )
    return token


def build_app(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    token: str | None = None,
    limits: Limits | None = None,
    max_batch: int = 64,
    batch_wait: float | int = 0.002,
) -> Any:
    """The server as an ASGI application.

    Args:
        rewards (`Mapping[str, Callable]` or `Sequence[Callable | str]`): Reward functions by name, or a list of
            functions and of what [`load_reward`] takes.
        token (`str`, *optional*): Bearer token that every request but `GET /health` must carry.
        limits ([`Limits`], *optional*): Bounds on what clients may send.
        max_batch (`int`, *optional*, defaults to `64`): Images of several requests joined into one call.
        batch_wait (`float`, *optional*, defaults to `0.002`): Seconds to wait for further requests.

    Returns:
        `fastapi.FastAPI`.

    Raises:
        ValueError: If two rewards have one name, or there are none.
        ImportError: If the server's dependencies are missing.
    """
    try:
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        from fastapi import FastAPI
    except ImportError as error:
        raise ImportError('The reward server needs fastapi. Run `pip install "trl_apex[server]"`.') from error
    from trl_apex.rewards.batching import RequestBatcher
    from trl_apex.rewards.guard import Guard
    from trl_apex.rewards.limits import MemoryBudget
    from trl_apex.rewards.routes import add_routes
    from trl_apex.rewards.server_state import ServerState

    functions = named_rewards(rewards)
    limits = limits or Limits()
    state = ServerState(functions, limits, MemoryBudget(limits.max_memory))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.batchers = {
            name: RequestBatcher(name, func, max_batch, batch_wait, limits.max_queue)
            for name, func in functions.items()
        }
        loading = asyncio.create_task(state.load())
        yield
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        for batcher in state.batchers.values():
            await batcher.close()
        for func in functions.values():
            unload = getattr(func, "unload", None)
            if callable(unload):
                await asyncio.to_thread(unload)

    app = FastAPI(
        title="trl_apex reward server",
        version=state.version,
        description="Scores images. Nothing that a client sends is ever unpickled.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = state
    add_routes(app, state)
    app.add_middleware(Guard, token=token, limits=limits, budget=state.budget)
    return app


def named_rewards(rewards: Mapping[str, Callable] | Sequence[Callable | str]) -> dict[str, Callable]:
    """Reward functions by objective name.

    Raises:
        ValueError: If two share a name, or there are none.
    """
    if isinstance(rewards, Mapping):
        functions = dict(rewards)
    else:
        loaded = [load_reward(reward) if isinstance(reward, str) else reward for reward in rewards]
        functions = {reward_name(func): func for func in loaded}
        if len(functions) < len(loaded):
            names = [reward_name(func) for func in loaded]
            raise ValueError(f"Each reward must have a name of its own. Found {names}. Pass `name=` to one of them.")
    if not functions:
        raise ValueError("A reward server must have a reward. Found none. Pass `--reward ocr`, for example.")
    return functions


def make_server(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    token_file: str | Path | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Any:
    """The server, bound to nothing yet; `run()` serves until it is told to stop.

    Args:
        rewards: See [`build_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on; other than loopback needs a token.
        port (`int`, *optional*, defaults to `8000`): Port to listen on; 0 for any free one.
        token (`str`, *optional*): Bearer token; see [`read_token`] for the other places it is looked for.
        token_file (`str` or `Path`, *optional*): File with the token.
        limits ([`Limits`], *optional*): Bounds on what clients may send.
        options: Further options of [`build_app`].

    Returns:
        `uvicorn.Server`.

    Raises:
        ValueError: If the address is not loopback and there is no token.
    """
    token = read_token(token, token_file)
    if host not in LOOPBACK_HOSTS and token is None:
        raise ValueError(
            f"A reward server on an address that others reach must have a token. Found none for {host}. Set "
            f"{TOKEN_VARIABLE} or pass `--token-file`, or listen on 127.0.0.1."
        )
    limits = limits or Limits()
    app = build_app(rewards, token, limits, **options)
    import uvicorn

    from trl_apex.rewards.guard import guarded_protocol

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=guarded_protocol(limits),
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=16 * 1024,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


def serve(
    rewards: Mapping[str, Callable] | Sequence[Callable | str],
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    token_file: str | Path | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> None:
    """Serve rewards until interrupted (`Ctrl-C` or SIGTERM); requests under way are finished first.

    Modules named in `rewards` are looked for in the current folder as well.

    Args:
        rewards: See [`build_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on; other than loopback needs a token.
        port (`int`, *optional*, defaults to `8000`): Port to listen on.
        token (`str`, *optional*): Bearer token; see [`read_token`] for the other places it is looked for.
        token_file (`str` or `Path`, *optional*): File with the token.
        limits ([`Limits`], *optional*): Bounds on what clients may send.
        options: Further options of [`build_app`].

    Raises:
        ValueError: If the settings are not safe or a reward is unknown.
        RuntimeError: If the server cannot listen on the address.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    server = make_server(rewards, host, port, token, token_file, limits, **options)
    names = ", ".join(server.config.app.state.server.functions)
    print(f"Serving {names} on http://{host}:{port} (stop with Ctrl-C)", flush=True)
    server.run()
    if not server.started:
        raise RuntimeError(
            f"The reward server must be able to listen on {host}:{port}. Found it taken or not allowed. "
            "Pass another `--port`."
        )
