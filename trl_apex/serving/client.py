"""Rewards that a reward server computes, as an async reward function."""

import asyncio
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import torch
from torch import Tensor

from trl_apex.redact import describe, redacted, secret_from
from trl_apex.rewards.base import (
    Images,
    RewardList,
    RewardLoadError,
    TransientRewardError,
    groups_of,
    one_per_prompt,
    reward_columns,
)
from trl_apex.rewards.scoring import on_this_device, retrying
from trl_apex.serving.local import LocalServer
from trl_apex.serving.wire import MEDIA_TYPE, PROTOCOL, check_column, encode_request, json_columns

TOKEN_VARIABLE = "TRL_APEX_REWARD_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
REQUEST_BYTES = 32 * 2**20  # larger parts are split further; the server takes twice as much
_STARTING = threading.Lock()  # two calls at once start one server


@dataclass(eq=False, repr=False)
class RemoteReward:
    """A reward on a reward server, as an async reward function.

    A batch is sent in small requests; a server that is busy or loading is waited for. Of several servers, each request
    goes to the one with the fewest, and to another one if that fails.

    Args:
        url (`str` or `Sequence[str]`): Address of the server, such as `"http://127.0.0.1:8000"`, or of several.
        name (`str`): The reward's name on the server, and of the objective.
        token_env (`str`, *optional*): Environment variable with the bearer token, read at each call and never stored.
        timeout (`float`, *optional*, defaults to `300`): Seconds for one request, waiting for a busy server included.
        startup_timeout (`float`, *optional*, defaults to `120`): Seconds that `check` waits for a loading server.
        batch_size (`int`, *optional*, defaults to `8`): Images per request. The server joins requests again.
        as_uint8 (`bool`, *optional*): True rounds float images to bytes, as the rewards of this package do; False sends
            float32, four times the size. Defaults to what gives the numbers of a local call: bytes for the rewards of
            this package and those that take no `images`, as the server says.
        max_retries, backoff (`int`, `float`, *optional*): See [`retrying`]; for each request, beside the scorer's own retries.
        max_concurrency (`int`, *optional*, defaults to `8`): Requests of a call under way at the same time.
        command (`str` or `Sequence[str]`, *optional*): Instead of `url`: arguments of a `trl-apex serve-rewards` that this
            process starts on this machine, such as `"--reward my_rewards:redness"`. It is started again once if it dies.
        python (`str`, *optional*): The Python that runs it, of another virtual environment. Defaults to this one's.
        device (`str`, *optional*): The one accelerator that it sees, `"cuda:1"`, or `"cpu"`. Defaults to this process's.
        whole_groups (`bool`, *optional*, defaults to `False`): Whether it compares the images of a group, one to a request.
        columns (`Sequence[str]`, *optional*): Dataset columns that are sent. Defaults to all, which must hold JSON values.

    Example:
        >>> RemoteReward("http://127.0.0.1:8000", "deqa").__name__
        'deqa'
    """

    range = "that of the reward on the server"
    weights_licence = "those of the reward on the server"

    url: str | Sequence[str] = ()
    name: str = ""
    token_env: str = TOKEN_VARIABLE
    timeout: float | int = 300.0
    startup_timeout: float | int = 120.0
    batch_size: int = 8
    as_uint8: bool | None = None
    max_retries: int = 0
    backoff: float | int = 0.5
    max_concurrency: int = 8
    command: str | Sequence[str] | None = None
    python: str | None = None
    device: str | None = None
    whole_groups: bool = False
    columns: Sequence[str] | None = None
    _warned: bool = field(default=False, init=False)
    _rounds: bool | None = field(default=None, init=False)  # `as_uint8`, once known
    _server: LocalServer | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        given = [self.url] if isinstance(self.url, str) else list(self.url)
        if bool(given) == bool(self.command) or not self.name:
            raise ValueError(
                f"A remote reward must have a `name`, and either a `url` or a `command`. Found name {self.name!r}, url "
                f"{self.url!r} and command {self.command!r}. Pass the reward's name on the server, and one of the two."
            )
        if not all(url.startswith(("http://", "https://")) for url in given):
            raise ValueError(
                f"`url` must start with http:// or https://. Found {self.url!r}. Pass the server's address."
            )
        if self.batch_size < 1 or self.max_concurrency < 1:
            raise ValueError(
                f"`batch_size` and `max_concurrency` must be at least 1. Found {self.batch_size} and "
                f"{self.max_concurrency}. Pass the images per request, and the requests at a time."
            )
        if any("?" in url or "#" in url for url in given):
            raise ValueError(
                f"`url` must be the server's address alone. Found more in {redacted(given)}. Put a token into "
                f"{self.token_env}."
            )
        self._rounds = self.as_uint8
        self.__name__, self._urls = self.name, [url.rstrip("/") for url in given]

    async def __call__(
        self, prompts: Sequence[str], completions: Images | None = None, images: Tensor | None = None, **columns: Any
    ) -> RewardList:
        """Have a batch scored; the arguments are those of [`Reward`], and the columns are sent.

        Raises:
            ValueError: For a column whose values JSON does not carry.
            TransientRewardError: If the server is away.
            RuntimeError: If it refuses the whole batch, or does not answer in time.
        """
        import httpx

        if self.command and self._server is None:
            await asyncio.to_thread(on_this_device(self.check))
        batch = one_per_prompt(self.__name__, prompts, completions, images)
        sent = json_columns({key: columns[key] for key in self._sent(columns)}, len(prompts))
        gate = asyncio.Semaphore(self.max_concurrency)
        limits = httpx.Limits(keepalive_expiry=2)  # less than the server's 5 s
        timeout = httpx.Timeout(None, connect=10 if len(self._urls) > 1 else None)  # `_post` has the others
        under_way: dict[str, int] = dict.fromkeys(self._urls, 0)  # requests by server
        away: set[str] = set()

        async def post(client: httpx.AsyncClient, body: bytes, size: int) -> RewardList:
            left, again = list(self._urls), self._server is not None
            while True:
                url = min(left, key=lambda url: (url in away, under_way[url]))
                under_way[url] += 1
                try:
                    return await self._post(client, url, body, size)
                except (TransientRewardError, RuntimeError) as error:
                    if isinstance(error, TransientRewardError):
                        away.add(url)
                        if again:
                            again = False
                            with suppress(RewardLoadError):
                                await asyncio.to_thread(self.check)
                                continue
                    left.remove(url)
                    if not left:
                        raise
                finally:
                    under_way[url] -= 1

        async def score(client: httpx.AsyncClient, part: slice) -> RewardList:
            own = {key: value[part] for key, value in sent.items()}
            async with gate:
                try:
                    body = await asyncio.to_thread(encode_request, prompts[part], batch[part], own, bool(self._rounds))
                except Exception as error:  # a picture that cannot be read
                    raise RefusedError(describe(error)) from error
                size = len(prompts[part])
                return await retrying(lambda: post(client, body, size), self.max_retries, self.backoff)

        async def score_each(client: httpx.AsyncClient, parts: list[slice]) -> list[tuple[slice, Any]]:
            answers = await asyncio.gather(*(score(client, part) for part in parts), return_exceptions=True)
            return list(zip(parts, answers, strict=True))

        async with httpx.AsyncClient(timeout=timeout, limits=limits, **self._client_options()) as client:
            if self._rounds is None and isinstance(batch, Tensor):
                await asyncio.to_thread(self._state, self._urls[0])
            parts = groups_of(columns.get("group_ids", prompts)) if self.whole_groups else self._parts(batch)
            answered = []
            for part, answer in await score_each(client, parts):
                alone = [slice(i, i + 1) for i in range(len(prompts))[part]]
                refused = isinstance(answer, RefusedError) and len(alone) > 1 and not self.whole_groups
                answered += await score_each(client, alone) if refused else [(part, answer)]
        rewards, answers = RewardList([]), [answer for _, answer in answered]
        for part, answer in answered:
            if isinstance(answer, BaseException):
                if not isinstance(answer, RuntimeError) or all(isinstance(a, RuntimeError) for a in answers):
                    raise answer
                size = len(prompts[part])  # a part that is refused or late costs its own images
                answer = RewardList([None] * size, [describe(answer)] * size)
            rewards += answer
            rewards.errors += answer.errors
        return rewards

    def check(self) -> None:
        """Start the server of `command`, and wait until all have this reward ready; a RewardLoadError says what is wrong."""
        with _STARTING:
            if self.command and self._server is None:
                self._server = LocalServer(self.command, self.python, self.device)
                self._urls = [self._server.url]
        deadline = time.monotonic() + self.startup_timeout
        for url in self._urls:
            while (state := self._state(url)) != "ready":
                if state != "loading" or time.monotonic() > deadline:
                    raise RewardLoadError(
                        f"The reward `{self.__name__}` at {redacted(url)} must be ready. Found: {state}."
                    )
                time.sleep(0.2)

    def offload(self) -> None:
        """Have the servers keep the reward's network in their CPUs' memory until the next call; a failure is a warning."""
        import httpx

        for url in self._urls:
            try:
                with httpx.Client(timeout=self.timeout, **self._client_options()) as client:
                    answer = client.post(f"{url}/v1/offload/{quote(self.__name__, safe='')}")
                found = "" if answer.status_code == 204 else f"it answers {answer.status_code}: {detail(answer)}"
            except httpx.HTTPError as error:
                found = describe(error)
            if found:
                warnings.warn(f"{redacted(url)} does not offload the reward `{self.__name__}`: {found}", stacklevel=2)

    def close(self) -> None:
        """Stop the server that `command` started; the next call starts it again."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _state(self, url: str) -> str:
        """The reward's state on the server, or what is wrong and what to do."""
        import httpx

        try:
            with httpx.Client(timeout=10, **self._client_options()) as client:
                health, listing = client.get(f"{url}/health"), client.get(f"{url}/v1/rewards")
        except httpx.HTTPError as error:
            if self._server is None:
                return f"no server answers ({describe(error)}). Start it, or check the address"
            return "loading" if self._server.restart() else "its server has ended. See what that printed above"
        if listing.status_code == 401:
            return f"the server refuses the token. Set {self.token_env} to the server's"
        if listing.status_code == 403:
            return "the server has no token and answers programs on its own machine alone. Give it a token"
        try:
            protocol = health.json()["protocol"]
            told = {reward["name"]: reward for reward in listing.json()}
            states = {name: reward["state"] for name, reward in told.items()}
        except (ValueError, KeyError, TypeError):
            return f"this is no reward server (it answers {health.status_code}). Check the address"
        if protocol != PROTOCOL:
            return f"the server speaks version {protocol}, this is {PROTOCOL}. Use one release on both"
        own = told.get(self.__name__, {})
        if self.as_uint8 is None:
            self._rounds = own.get("exact") != "true"
        if own.get("whole_groups") == "true" and not self.whole_groups:
            return "it compares the images of a group, and gets single images. Pass whole_groups=True"
        return states.get(self.__name__, f"the server has {', '.join(states)}, not this one. Check the name")

    def check_dataset(self, dataset: Any) -> None:
        """Raise ValueError where a column of a trainer's dataset cannot be sent."""
        for name in self._sent(reward_columns(dataset.column_names)):
            check_column(name, dataset[name])

    def _sent(self, columns: Iterable[str]) -> list[str]:
        return [name for name in columns if self.columns is None or name in (*self.columns, "group_ids")]

    def _parts(self, batch: Images) -> list[slice]:
        """The batch in requests of `batch_size` images, fewer where they are very large."""
        if isinstance(batch, Tensor):
            largest = batch[:1].numel() * (1 if self._rounds or batch.dtype == torch.uint8 else 4)
        else:
            largest = max((3 * image.width * image.height for image in batch), default=1)
        size = max(1, min(self.batch_size, REQUEST_BYTES // max(1, largest)))
        return [slice(i, i + size) for i in range(0, len(batch), size)]

    async def _post(self, client: Any, url: str, body: bytes, size: int) -> RewardList:
        import httpx

        address, headers = f"{url}/v1/rewards/{quote(self.__name__, safe='')}", {"Content-Type": MEDIA_TYPE}
        said = ""
        try:
            async with asyncio.timeout(self.timeout):
                while True:  # while it loads, or has more connections than it takes, which it may also cut off
                    try:
                        response = await client.post(address, content=body, headers=headers)
                    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
                        said, wait = f": {describe(error)}", 1
                    else:
                        if response.status_code != 503:
                            break
                        asked = response.headers.get("retry-after", "")
                        said, wait = f": {detail(response)}", min(int(asked), 30) if asked.isdigit() else 1
                    await asyncio.sleep(wait)
        except TimeoutError:
            raise RuntimeError(f"{url} did not answer within {self.timeout:g} s{said}") from None
        except httpx.TransportError as error:
            raise TransientRewardError(f"{url} does not answer ({describe(error)})") from error
        if (status := response.status_code) != 200:
            passing, refused = status in (408, 429, 502, 504), status in (400, 413, 422)
            kind = TransientRewardError if passing else RefusedError if refused else RuntimeError
            raise kind(f"{url} answers {status}: {detail(response)}")
        answer = response.json()
        if not len(answer["rewards"]) == len(answer["errors"]) == size:
            raise RuntimeError(f"{url} answers with {len(answer['rewards'])} rewards for {size} images")
        return RewardList(answer["rewards"], answer["errors"])

    def _client_options(self) -> dict[str, Any]:
        import httpx

        token = secret_from(self.token_env)
        addresses = [urlsplit(url) for url in self._urls]
        plain = [url.hostname for url in addresses if url.scheme == "http" and url.hostname not in LOOPBACK]
        if token and plain and not self._warned:
            self._warned = True
            warnings.warn(
                f"The token in {self.token_env} goes to {plain[0]} unencrypted. Start the server with "
                "`--ssl-certfile` and `--ssl-keyfile` (or put a proxy with TLS before it) and use https://.",
                stacklevel=3,
            )
        return {
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "trust_env": False,
            # Read for https alone, since that takes longer than a request; SSL_CERT_FILE may name certificates.
            "verify": httpx.create_ssl_context() if any(url.scheme == "https" for url in addresses) else False,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone: a server belongs to the process that started it."""
        return self.__dict__ | {"_server": None}

    def __repr__(self) -> str:
        where = f"command={redacted(self.command)!r}" if self.command else f"url={redacted(self.url)!r}"
        return f"RemoteReward({where}, name={self.__name__!r})"


class RefusedError(RuntimeError):
    """The server does not take these images or prompts."""


def detail(response: Any) -> str:
    """The server's own words on a refusal, in one short line."""
    try:
        text = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200]
