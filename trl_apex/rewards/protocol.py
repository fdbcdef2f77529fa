"""What a reward is: a callable with TRL's keywords; and the base class of the rewards that own a network."""

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

Images = Sequence[Image.Image] | Tensor


# Loading sets PyTorch's default dtype for a moment, for the whole process: one network at a time.
_LOADING = threading.RLock()


class RewardLoadError(ValueError):
    """A reward could not load its weights or is set up wrongly: the run cannot go on with it."""


class TransientRewardError(ConnectionError):
    """A failure that may pass, such as a busy server. The scorer tries the call again.

    Args:
        message (`str`): The cause, in one line.
        retry_after (`float`, *optional*): Seconds that the other side asked to wait.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RewardList(list):
    """Rewards of a batch, with the cause of each missing one.

    A plain list is enough for a reward function. This one also tells a sample that could not be scored because
    something broke (`errors[i]` is a string) from one that the reward does not apply to (`errors[i]` is None).

    Args:
        rewards (`Sequence[float | None]`): One number or None per sample.
        errors (`Sequence[str | None]`, *optional*): One cause or None per sample.

    Example:

    ```python
    >>> from trl_apex.rewards.protocol import RewardList
    >>> rewards = RewardList([0.5, None], errors=[None, "the image is truncated"])
    >>> rewards, rewards.errors
    ([0.5, None], [None, 'the image is truncated'])

    ```
    """

    def __init__(self, rewards: Sequence[float | None], errors: Sequence[str | None] | None = None) -> None:
        super().__init__(rewards)
        self.errors: list[str | None] = list(errors) if errors is not None else [None] * len(rewards)


@runtime_checkable
class RewardFunction(Protocol):
    """Any callable, blocking or `async`, that takes TRL's keywords and returns one number or None per sample.

    The keywords are `prompts`, `completions`, `images`, `completion_ids` (None for images), every other column of
    the dataset as a list, `trainer_state`, `log_extra` and `log_metric`. Larger is better.
    """

    def __call__(self, *, prompts: list[str], completions: Any, **kwargs: Any) -> Any: ...


class Reward:
    """Base of this package's rewards: a name, loading at the first call, batches, pickling and unloading.

    A subclass implements `_load()`, which returns whatever it must hold in memory, and
    `_score(loaded, images, prompts, columns)`, which scores one batch.

    Args:
        name (`str`, *optional*): Name of the objective. Defaults to the class's own.
        device (`str` or `torch.device`, *optional*): Where the network runs; without an index, the current device of
            the thread that loads it. Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Precision of the network. Defaults to float32, so that numbers are
            comparable between machines.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass.

    Raises:
        ValueError: If `batch_size` is below 1.

    Note:
        Networks are not thread-safe, so one instance scores one batch at a time.
    """

    default_name: ClassVar[str] = "reward"
    range: ClassVar[str] = ""
    weights_licence: ClassVar[str] = ""

    def __init__(
        self,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Found {batch_size}. Pass the samples per forward.")
        self.__name__ = name or self.default_name
        self.device = torch.device(device) if device is not None else default_device()
        self.dtype = dtype or torch.float32
        self.batch_size = batch_size
        self._loaded: Any = None
        self._lock = threading.RLock()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Images | None = None,
        images: Float[Tensor, "B 3 H W"] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score a batch.

        Args:
            prompts (`Sequence[str]`): One prompt per image.
            completions (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The images; a
                tensor is in [0, 1].
            images (`Tensor` of shape `[B, 3, H, W]`, *optional*): The same images as floats in [0, 1]; used instead
                of `completions` where given.
            columns: Every other keyword that TRL passes; a list holds one entry per image.

        Returns:
            `list[float | None]`: One reward per image; None where the reward does not apply.

        Raises:
            ValueError: If there is not one image per prompt.
        """
        batch = images if images is not None else completions
        if batch is None or len(batch) != len(prompts):
            found = "no images" if batch is None else f"{len(batch)} images"
            raise ValueError(
                f"`{self.__name__}` needs one image per prompt. Found {found} for {len(prompts)} prompts. "
                "Pass `completions` or `images` of the same length as `prompts`."
            )
        rewards: list[float | None] = []
        with self._lock, torch.inference_mode():
            loaded = self.load()
            for start in range(0, len(prompts), self.batch_size):
                part = slice(start, start + self.batch_size)
                per_sample = {
                    key: value[part]
                    for key, value in columns.items()
                    if isinstance(value, (list, tuple)) and len(value) == len(prompts)
                }
                rewards += self._score(loaded, batch[part], list(prompts[part]), per_sample)
        return rewards

    def load(self) -> Any:
        """Load the weights now instead of at the first call.

        Raises:
            RewardLoadError: If the weights cannot be loaded.
            ImportError: If an optional dependency is missing.
        """
        with self._lock:
            if self._loaded is None:
                try:
                    self.device = with_index(self.device)
                    with _LOADING:
                        self._loaded = self._load()
                except (ImportError, RewardLoadError):
                    raise
                except Exception as error:
                    raise RewardLoadError(
                        f"The reward `{self.__name__}` must be able to load its weights. "
                        f"Found {type(error).__name__}: {error}. Check the model id or path and the connection."
                    ) from error
            return self._loaded

    def unload(self) -> None:
        """Free the memory of the network; the next call loads it again."""
        with self._lock:
            self._loaded = None
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()

    def _load(self) -> Any:
        raise NotImplementedError

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list[float | None]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone: weights and locks stay in the process that made them."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_loaded", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loaded=None, _lock=threading.RLock())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.__name__!r}, device={str(self.device)!r}, dtype={self.dtype})"


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def with_index(device: torch.device) -> torch.device:
    """The device with the index that it has in this thread, so that it is the same one in every other thread.

    Example:

    ```python
    >>> from trl_apex.rewards.protocol import with_index
    >>> with_index(torch.device("cpu")), with_index(torch.device("cuda:1"))
    (device(type='cpu'), device(type='cuda', index=1))

    ```
    """
    accelerator = torch.accelerator.current_accelerator()
    if device.index is not None or accelerator is None or device.type != accelerator.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())
