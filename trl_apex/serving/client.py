"""Rewards that a reward server computes, as an async reward function."""

import asyncio
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from trl_apex.redact import secret_from
from trl_apex.rewards.base import Images, RewardList, RewardLoadError, TransientRewardError, one_per_prompt
from trl_apex.rewards.scoring import describe, retrying
from trl_apex.serving.wire import MEDIA_TYPE, PROTOCOL, encode_request, json_columns

TOKEN_VARIABLE = "TRL_APEX_REWARD_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
REQUEST_BYTES = 32 * 2**20  # larger parts are split further; the server takes twice as much


@dataclass(eq=False, repr=False)
class RemoteReward:
    """A reward on a reward server, as an async reward function.

    A batch is sent in small requests; a server that is busy or loading is waited for.

    Args:
        url (`str`): Address of the server, such as `"http://127.0.0.1:8000"`.
        name (`str`): The reward's name on the server, and of the objective.
        token_env (`str`, *optional*, defaults to `"TRL_APEX_REWARD_TOKEN"`): Environment variable with the bearer
            token, read at each call and never stored.
        timeout (`float`, *optional*, defaults to `300`): Seconds for one request, waiting for a busy server included.
        startup_timeout (`float`, *optional*, defaults to `120`): Seconds that `check` waits for a loading server.
        batch_size (`int`, *optional*, defaults to `8`): Images per request. The server joins requests again.
        as_uint8 (`bool`, *optional*, defaults to `True`): Round float images to bytes, as the rewards of this package do.
            False sends float32, four times the size, for a reward that reads more than 8 bits.
        max_retries, backoff (`int`, `float`, *optional*, default to `0`, `0.5`): See [`retrying`]; for each request. The
            scorer has retries of its own.
        max_concurrency (`int`, *optional*, defaults to `8`): Requests of a call under way at the same time.

    Example:
        >>> RemoteReward("http://127.0.0.1:8000", "deqa").__name__
        'deqa'
    """

    url: str
    name: str
    token_env: str = TOKEN_VARIABLE
    timeout: float | int = 300.0
    startup_timeout: float | int = 120.0
    batch_size: int = 8
    as_uint8: bool = True
    max_retries: int = 0
    backoff: float | int = 0.5
    max_concurrency: int = 8
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"`url` must start with http:// or https://. Found {self.url!r}. Pass the server's address."
            )
        if self.batch_size < 1 or self.max_concurrency < 1:
            raise ValueError(
                f"`batch_size` and `max_concurrency` must be at least 1. Found {self.batch_size} and "
                f"{self.max_concurrency}. Pass the images per request, and the requests at a time."
            )
        self.__name__, self.url = self.name, self.url.rstrip("/")

    async def __call__(
        self, prompts: Sequence[str], completions: Images | None = None, images: Tensor | None = None, **columns: Any
    ) -> RewardList:
        """Have a batch scored; the arguments are those of [`Reward`], and the columns of JSON values are sent.

        Raises:
            TransientRewardError: If the server is away.
            RuntimeError: If it refuses the whole batch, or does not answer in time.
        """
        import httpx

        batch = one_per_prompt(self.__name__, prompts, completions, images)
        sent = json_columns(columns, len(prompts))
        gate = asyncio.Semaphore(self.max_concurrency)
        limits = httpx.Limits(keepalive_expiry=2)  # less than the server's 5 s

        async def score(client: httpx.AsyncClient, part: slice) -> RewardList:
            own = {key: value[part] for key, value in sent.items()}
            async with gate:
                body = await asyncio.to_thread(encode_request, prompts[part], batch[part], own, self.as_uint8)
                size = len(prompts[part])
                return await retrying(lambda: self._post(client, body, size), self.max_retries, self.backoff)

        async with httpx.AsyncClient(timeout=None, limits=limits, **self._client_options()) as client:
            parts = self._parts(batch)
            answers = await asyncio.gather(*(score(client, part) for part in parts), return_exceptions=True)
        rewards = RewardList([])
        for part, answer in zip(parts, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, RuntimeError) or all(isinstance(a, RuntimeError) for a in answers):
                    raise answer
                size = len(prompts[part])  # a part that is refused or late costs its own images
                answer = RewardList([None] * size, [describe(answer)] * size)
            rewards += answer
            rewards.errors += answer.errors
        return rewards

    def check(self) -> None:
        """Ask the server whether it has this reward ready; waits while it is loading.

        Raises:
            RewardLoadError: With what is wrong, in one line.
        """
        import httpx

        deadline = time.monotonic() + self.startup_timeout
        while True:
            try:
                with httpx.Client(timeout=10, **self._client_options()) as client:
                    state = self._state(client.get(f"{self.url}/health"), client.get(f"{self.url}/v1/rewards"))
            except httpx.HTTPError as error:
                state = f"no server answers ({describe(error)}). Start it, or check the address"
            if state == "ready":
                return
            if state != "loading" or time.monotonic() > deadline:
                raise RewardLoadError(f"The reward `{self.__name__}` at {self.url} must be ready. Found: {state}.")
            time.sleep(0.2)

    def _state(self, health: Any, listing: Any) -> str:
        """The reward's state on the server, or what is wrong and what to do."""
        if listing.status_code == 401:
            return f"the server refuses the token. Set {self.token_env} to the server's"
        if listing.status_code == 403:
            return "the server has no token and answers programs on its own machine alone. Give it a token"
        try:
            protocol = health.json()["protocol"]
            states = {reward["name"]: reward["state"] for reward in listing.json()}
        except (ValueError, KeyError, TypeError):
            return f"this is no reward server (it answers {health.status_code}). Check the address"
        if protocol != PROTOCOL:
            return f"the server speaks version {protocol}, this is {PROTOCOL}. Use one release on both"
        return states.get(self.__name__, f"the server has {', '.join(states)}, not this one. Check the name")

    def _parts(self, batch: Images) -> list[slice]:
        """The batch in requests of `batch_size` images, fewer where they are very large."""
        if isinstance(batch, Tensor):
            largest = batch[:1].numel() * (1 if self.as_uint8 or batch.dtype == torch.uint8 else 4)
        else:
            largest = max((3 * image.width * image.height for image in batch), default=1)
        size = max(1, min(self.batch_size, REQUEST_BYTES // max(1, largest)))
        return [slice(i, i + size) for i in range(0, len(batch), size)]

    async def _post(self, client: Any, body: bytes, size: int) -> RewardList:
        import httpx

        address, headers = f"{self.url}/v1/rewards/{self.__name__}", {"Content-Type": MEDIA_TYPE}
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
            raise RuntimeError(f"{self.url} did not answer within {self.timeout:g} s{said}") from None
        except httpx.TransportError as error:
            raise TransientRewardError(f"{self.url} does not answer ({describe(error)})") from error
        if response.status_code in (408, 429, 502, 504):
            raise TransientRewardError(f"{self.url} answers {response.status_code}: {detail(response)}")
        if response.status_code != 200:
            raise RuntimeError(f"{self.url} answers {response.status_code}: {detail(response)}")
        answer = response.json()
        if not len(answer["rewards"]) == len(answer["errors"]) == size:
            raise RuntimeError(f"{self.url} answers with {len(answer['rewards'])} rewards for {size} images")
        return RewardList(answer["rewards"], answer["errors"])

    def _client_options(self) -> dict[str, Any]:
        import httpx

        token = secret_from(self.token_env)
        address = urlsplit(self.url)
        if token and address.scheme == "http" and address.hostname not in LOOPBACK and not self._warned:
            self._warned = True
            warnings.warn(
                f"The token in {self.token_env} goes to {address.hostname} unencrypted. Start the server with "
                "`--ssl-certfile` and `--ssl-keyfile` (or put a proxy with TLS before it) and use https://.",
                stacklevel=3,
            )
        return {
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "trust_env": False,
            # Read for https alone, since that takes longer than a request; SSL_CERT_FILE may name certificates.
            "verify": httpx.create_ssl_context() if address.scheme == "https" else False,
        }

    def __repr__(self) -> str:
        return f"RemoteReward(url={self.url!r}, name={self.__name__!r})"


def detail(response: Any) -> str:
    """The server's own words on a refusal, in one short line."""
    try:
        text = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        text = response.text
    return " ".join(str(text).split())[:200]
