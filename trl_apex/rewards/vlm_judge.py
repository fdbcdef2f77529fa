"""A vision-language model behind an OpenAI-compatible endpoint as the judge of images and of pairs of images."""

import asyncio
import base64
import hashlib
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from trl_apex.redact import describe, secret_from
from trl_apex.rewards.base import Images, RewardList, TransientRewardError, one_per_prompt, to_pil
from trl_apex.rewards.scoring import retrying

INSTRUCTION = """Rate how well this generated image matches its caption and how good it looks.
Think briefly about each point of the caption, then end with one line of the form
Final Score: X
where X is a number from {low:g} (worst) to {high:g} (best).
Caption: {prompt}"""
SHARES = "\n".join(f"{respect} Score:\n Image 1: X\n Image 2: Y" for respect in ("Alignment", "Coherence", "Style"))
RESPECTS = """Alignment: the image shows what the caption says.
Coherence: everything in it makes sense, without broken shapes or other visible errors.
Style: it is pleasing to look at, whatever the caption says."""
ASPECTS = f"""Rate this generated image against its caption by three scores from {{low:g}} (worst) to {{high:g}} (best).
{RESPECTS}
Answer with these three lines, decimals allowed:
Alignment Score ({{low:g}}-{{high:g}}): X
Coherence Score ({{low:g}}-{{high:g}}): Y
Style Score ({{low:g}}-{{high:g}}): Z
Text Caption: [{{prompt}}]"""
PAIR = f"""Compare two generated images, Image 1 and Image 2, that share a caption, in three respects.
{RESPECTS}
In each, share out 1.0 between the two images, more to the better one. Answer in this form, decimals allowed:
{SHARES}
Text Caption: [{{prompt}}]"""
SCORE = re.compile(r"\bscore\b(?: ?\([^)]*\))?[\s*_`]*(?:is|of|:|=)[\s*_`]*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
SHARE = re.compile(r"\bImage ([12])[\s*_`]*[:=][\s*_`]*(\d+(?:\.\d+)?)", re.IGNORECASE)
KEPT = 4096  # scores, so that an image is judged once for a prompt
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(eq=False, repr=False)
class VLMJudgeReward:
    """The score that a vision-language model gives in words, asked over an OpenAI-compatible endpoint.

    An async reward function: one request per image to `{url}/chat/completions`, with the image as a PNG data URL and
    temperature 0. [`parse_score`] reads the answer, as for UnifiedReward; one without a score counts as a failure. It is a
    judge of pairs too, for [`PairwiseReward`]: then a request holds two images, and [`parse_share`] reads the answer.

    Args:
        url (`str`): The endpoint without `/chat/completions`, such as `"http://127.0.0.1:8000/v1"`.
        model (`str`): The model's name at the endpoint.
        instruction (`str`, *optional*): What the judge is told, with the fields `{prompt}`, `{low}` and `{high}`.
        low, high (`float`, *optional*, default to `1`, `5`): The worst and the best score.
        api_key_env (`str`, *optional*): Environment variable with the key, read at each call and never stored.
        max_concurrency (`int`, *optional*, defaults to `16`): Requests under way at the same time.
        max_retries, backoff (`int`, `float`, *optional*, default to `2`, `0.5`): See [`retrying`]; for each image.
        timeout (`float`, *optional*, defaults to `60`): Seconds for one request.
        mean (`bool`, *optional*): Take the mean of an answer's scores, such as UnifiedReward-2.0's three, instead of the last.
        pair_instruction (`str`, *optional*): What it is told about two images, with the field `{prompt}`.

    Raises:
        RuntimeError: At a call, if no image at all could be judged because the endpoint is away or busy.

    Reference:
        Wang et al., UnifiedReward, arXiv 2503.05236, for the form of the answer.
    """

    default_name = "vlm_judge"
    range = "`low` to `high`, larger is better"
    weights_licence = "that of the model behind the endpoint"

    url: str
    model: str
    instruction: str = INSTRUCTION
    low: float | int = 1.0
    high: float | int = 5.0
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: int = 16
    max_retries: int = 2
    backoff: float | int = 0.5
    timeout: float | int = 60.0
    max_tokens: int = 512
    name: str | None = None
    mean: bool = False
    pair_instruction: str = PAIR
    _kept: dict[tuple, float] = field(default_factory=dict, init=False)  # scores by prompt and images

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(
                f"`low` must be below `high`. Found {self.low} and {self.high}. Pass the worst and the best score."
            )
        for name in ("instruction", "pair_instruction"):
            try:
                getattr(self, name).format(prompt="", low=self.low, high=self.high)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"`{name}` must have no fields but {{prompt}}, {{low}} and {{high}}. Found one that gives "
                    f"{describe(error)}. Double the braces that are meant as such: {{{{ and }}}}."
                ) from error
        self.__name__, self.url = self.name or self.default_name, self.url.rstrip("/")

    async def __call__(
        self,
        prompts: Sequence[str],
        completions: Images | None = None,
        images: Images | None = None,
        first: Images | None = None,
        second: Images | None = None,
        **columns: Any,
    ) -> RewardList:
        """Judge a batch, and give a cause for each image or pair that could not be judged.

        Args:
            prompts, completions, images, columns: See [`Reward`].
            first, second (`Sequence[PIL.Image.Image]`, *optional*): The two images of each pair, instead of `completions`.

        Returns:
            A score per image, or per pair the share of the first image, 0 to 1.
        """
        import httpx

        asked: Sequence[Images]
        if completions is None and images is None and first is not None and second is not None:
            asked = [list(pair) for pair in zip(first, second, strict=True)]
        else:
            batch = one_per_prompt(self.__name__, prompts, completions, images)
            asked = [batch[i : i + 1] for i in range(len(batch))]
        gate = asyncio.Semaphore(self.max_concurrency)
        key = secret_from(self.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Certificates are read for https alone: reading them takes longer than a request.
        verify = self.url.startswith("https://")
        async with httpx.AsyncClient(timeout=self.timeout, headers=headers, verify=verify) as client:

            async def judge(prompt: str, images: Images) -> float:
                pictures = to_pil(images)  # here, so that a broken one is no other's trouble
                key = (prompt, *((p.size, hashlib.blake2b(p.tobytes(), digest_size=16).digest()) for p in pictures))
                async with gate:
                    if key not in self._kept:
                        self._kept[key] = await retrying(
                            lambda: self._judge(client, prompt, pictures), self.max_retries, self.backoff
                        )
                    return self._kept[key]

            answers = await asyncio.gather(*map(judge, prompts, asked), return_exceptions=True)
        for oldest in list(self._kept)[:-KEPT]:
            del self._kept[oldest]
        errors = [answer if isinstance(answer, BaseException) else None for answer in answers]
        causes = [None if error is None else describe(error) for error in errors]
        if errors and all(isinstance(error, TransientRewardError | httpx.TransportError) for error in errors):
            raise RuntimeError(f"no image could be judged: {causes[0]}") from errors[0]
        return RewardList([None if isinstance(answer, BaseException) else answer for answer in answers], causes)

    async def _judge(self, client: Any, prompt: str, pictures: list[Image.Image]) -> float:
        """One image's score, or a pair's. Plain httpx: the openai package has no `backoff`, and always sends a key."""
        pair = len(pictures) == 2
        instruction = self.pair_instruction if pair else self.instruction
        text = instruction.format(prompt=prompt, low=self.low, high=self.high)
        urls = [await asyncio.to_thread(data_url, picture) for picture in pictures]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": text})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        response = await client.post(f"{self.url}/chat/completions", json=body)
        if response.status_code in PASSING:
            raise TransientRewardError(f"the endpoint answers {response.status_code}")
        if response.status_code != 200:
            raise RuntimeError(f"the endpoint answers {response.status_code}: {response.text[:200]}")
        answer = response.json()["choices"][0]["message"]["content"]
        said = answer if isinstance(answer, str) else ""
        score = parse_share(said) if pair else parse_score(said, self.low, self.high, self.mean)
        if score is None:
            wanted = "shares of the two images" if pair else f"score from {self.low:g} to {self.high:g}"
            raise RuntimeError(f"the answer states no {wanted}: {answer!r:.200}")
        return score


@dataclass(eq=False, repr=False)
class UnifiedReward(VLMJudgeReward):
    """UnifiedReward-2.0 behind an OpenAI-compatible endpoint: the mean of its scores for alignment, coherence and style.

    [`VLMJudgeReward`] that asks for the three scores of the published answer, as a reward or, in [`PairwiseReward`], for
    the shares of two images. The instructions are this package's: the authors say that the model takes any wording.

    Reference:
        Wang et al., UnifiedReward, arXiv 2503.05236.
    """

    default_name = "unified_reward"
    range = "1 to 5, larger is better"

    instruction: str = ASPECTS
    mean: bool = True


def parse_score(text: str, low: float | int, high: float | int, mean: bool = False) -> float | None:
    """The last score that a judge's answer states, or the mean of all; None if there is none, or one outside `[low, high]`.

    Example:
        >>> parse_score("Alignment Score: 2\\nFinal Score: 3.5", 1, 5), parse_score("The score is 4/5.", 1, 5)
        (3.5, 4.0)
        >>> parse_score("Alignment Score (1-5): 4\\nStyle Score (1-5): 3", 1, 5, mean=True)
        3.5
        >>> parse_score("A fine image.", 1, 5)
    """
    text = unicodedata.normalize("NFKC", text)  # full-width colons and digits too
    found = [float(score) for score in SCORE.findall(text)]
    counted = found if mean else found[-1:]
    return sum(counted) / len(counted) if counted and all(low <= score <= high for score in counted) else None


def parse_share(text: str) -> float | None:
    """The mean over all respects of the first image's share `x_1 / (x_1 + x_2)`; None where a respect lacks one of the two.

    Example:
        >>> parse_share("Alignment Score:\\n Image 1: 0.8\\n Image 2: 0.2\\nStyle Score:\\n Image 1: 0.3\\n Image 2: 0.3")
        0.65
        >>> parse_share("Image 1: 0.8")
    """
    found = SHARE.findall(unicodedata.normalize("NFKC", text))
    pairs = list(zip(found[::2], found[1::2], strict=False))
    shares = [(float(a), float(b)) for (one, a), (two, b) in pairs if (one, two) == ("1", "2")]
    if not shares or 2 * len(shares) != len(found) or not all(map(sum, shares)):
        return None
    return sum(a / (a + b) for a, b in shares) / len(shares)


def data_url(image: Image.Image) -> str:
    """An image as a PNG data URL, lossless."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
