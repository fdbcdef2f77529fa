"""Rewards that another process or machine computes."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trl_apex.rewards.calling import describe
from trl_apex.rewards.protocol import Images, RewardList, RewardLoadError, TransientRewardError
from trl_apex.rewards.wire import PROTOCOL, encode_request, json_columns

TOKEN_VARIABLE = "TRL_APEX_REWARD_TOKEN"


class RemoteReward:
    """A reward on a reward server, as an async reward function.

    Float images travel as float32 and pictures losslessly, so the numbers are those of the same reward run locally.

    Args:
        url (`str`): Address of the server, such as `"http://127.0.0.1:8000"`.
        name (`str`): The reward's name on the server, and of the objective.
        token_env (`str`, *optional*, defaults to `"TRL_APEX_REWARD_TOKEN"`): Environment variable with the bearer
            token, read at each call and never stored.
        timeout (`float`, *optional*, defaults to `300`): Seconds for one request.
        startup_timeout (`float`, *optional*, defaults to `120`): Seconds that `check` waits for a server that is
            still loading.
        batch_size (`int`, *optional*, defaults to `64`): Images per request; a larger batch is sent in parts, at the
            same time.
        as_uint8 (`bool`, *optional*, defaults to `False`): Send float images as bytes, a quarter of the size. Every
            reward of this package rounds to bytes first, so their numbers stay the same.
        max_retries (`int`, *optional*, defaults to `0`): How often a request is tried again after a failure that may
            pass, when used without the scorer, which has retries of its own.
        backoff (`float`, *optional*, defaults to `0.5`): Seconds before the first of these; each further one waits
            twice as long.

    Raises:
        ValueError: If `url` is no HTTP address or `batch_size` is below 1.

    Example:

    ```python
    >>> from trl_apex.rewards import RemoteReward
    >>> RemoteReward("http://127.0.0.1:8000", "deqa").__name__
    'deqa'

    ```
    """

    def __init__(
        self,
        url: str,
        name: str,
        token_env: str = TOKEN_VARIABLE,
        timeout: float | int = 300.0,
        startup_timeout: float | int = 120.0,
        batch_size: int = 64,
        as_uint8: bool = False,
        max_retries: int = 0,
        backoff: float | int = 0.5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must start with http:// or https://. Found {url!r}. Pass the server's address.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Found {batch_size}. Pass the images per request.")
        self.__name__ = name
        self.url, self.token_env, self.timeout, self.startup_timeout = (
            url.rstrip("/"),
            token_env,
            timeout,
            startup_timeout,
        )
        self.batch_size, self.as_uint8, self.max_retries, self.backoff = batch_size, as_uint8, max_retries, backoff

    async def __call__(
        self, prompts: Sequence[str], completions: Images | None = None, images: Tensor | None = None, **columns: Any
    ) -> RewardList:
        """Have a batch scored.

        Args:
            prompts (`Sequence[str]`): One prompt per image.
            completions (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The images.
            images (`Tensor` of shape `[B, 3, H, W]`, *optional*): Used instead of `completions` where given.
            columns: Columns of the dataset; those of JSON values are sent.

        Returns:
            [`RewardList`], with the server's cause for each image that it could not score.

        Raises:
            TransientRewardError: If the server is away or busy.
            RuntimeError: If it refuses the request.
        """
        import httpx

        batch = images if images is not None else completions
        if batch is None or len(batch) != len(prompts):
            raise ValueError(
                f"`{self.__name__}` needs one image per prompt. Found {0 if batch is None else len(batch)} for "
                f"{len(prompts)} prompts. Pass `completions` or `images` of the same length as `prompts`."
            )
        sent = json_columns(columns, len(prompts))
        async with httpx.AsyncClient(timeout=self.timeout, **self._client_options()) as client:
            slices = [slice(i, i + self.batch_size) for i in range(0, len(prompts), self.batch_size)]
            parts = await asyncio.gather(
                *(
                    self._score(client, prompts[part], batch[part], {key: value[part] for key, value in sent.items()})
                    for part in slices
                )
            )
        rewards = [reward for part in parts for reward in part]
        return RewardList(rewards, [error for part in parts for error in part.errors])

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
                    health = client.get(f"{self.url}/health")
                    listing = client.get(f"{self.url}/v1/rewards")
                problem, loading = self._problem(health, listing)
            except httpx.HTTPError as error:
                problem, loading = f"no server answers ({describe(error)}). Start it, or check the address", False
            if problem is None:
                return
            if not loading or time.monotonic() > deadline:
                raise RewardLoadError(f"The reward `{self.__name__}` at {self.url} must be ready. Found: {problem}.")
            time.sleep(0.2)

    def _problem(self, health: Any, listing: Any) -> tuple[str | None, bool]:
        """What is wrong, and whether waiting may help."""
        if listing.status_code == 401:
            return f"the server refuses the token. Set {self.token_env} to the server's", False
        if listing.status_code == 403:
            return "the server has no token and answers programs on its own machine alone. Give it a token", False
        try:
            protocol = health.json()["protocol"]
            states = {reward["name"]: reward["state"] for reward in listing.json()}
        except (ValueError, KeyError, TypeError):
            return f"this is no reward server (it answers {health.status_code}). Check the address", False
        if protocol != PROTOCOL:
            return f"the server speaks version {protocol}, this is {PROTOCOL}. Use one release on both", False
        if self.__name__ not in states:
            return f"the server has {', '.join(states)}, not this one. Check the name", False
        state = states[self.__name__]
        return (None, False) if state == "ready" else (state, state == "loading")

    async def _score(
        self, client: Any, prompts: Sequence[str], images: Images, columns: dict[str, list]
    ) -> RewardList:
        files = await asyncio.to_thread(encode_request, prompts, images, columns, self.as_uint8)
        for attempt in range(self.max_retries + 1):
            try:
                return await self._post(client, files, len(prompts))
            except TransientRewardError as error:
                if attempt == self.max_retries:
                    raise
                await asyncio.sleep(max(self.backoff * 2**attempt, error.retry_after or 0.0))
        raise AssertionError("unreachable")

    async def _post(self, client: Any, files: list, size: int) -> RewardList:
        import httpx

        try:
            response = await client.post(f"{self.url}/v1/rewards/{self.__name__}", files=files)
        except httpx.TransportError as error:
            raise TransientRewardError(f"{self.url} does not answer ({describe(error)})") from error
        if response.status_code in (408, 429, 502, 503):
            asked = response.headers.get("retry-after", "")
            wait = float(asked) if asked.isdigit() else None
            raise TransientRewardError(f"{self.url} answers {response.status_code}: {detail(response)}", wait)
        if response.status_code != 200:
            raise RuntimeError(f"{self.url} answers {response.status_code}: {detail(response)}")
        answer = response.json()
        rewards, errors = answer["rewards"], answer["errors"]
        if len(rewards) != size or len(errors) != size:
            raise RuntimeError(f"{self.url} answers with {len(rewards)} rewards for {size} images")
        return RewardList([None if reward is None else float(reward) for reward in rewards], errors)

    def _client_options(self) -> dict[str, Any]:
        token = os.environ.get(self.token_env)
        return {
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "trust_env": False,
            # Certificates are read for https alone: reading them takes longer than a request.
            "verify": self.url.startswith("https://"),
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
