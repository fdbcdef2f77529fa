"""Whether a checkpoint belongs to the model that is to go on from it, read from file headers before anything is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from .checkpoint import read_object

ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "optimizer.bin")


def check_fit(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose weights are not those of `model`, by name and shape.

    Trainer would load what fits of it and go on; and it would take a pickle where there are no safetensors.

    Args:
        checkpoint (`str` or `Path`): of one process or DDP.
        model (`nn.Module`): the denoiser, with its adapter if there is one.

    Raises:
        ValueError: names the file and the first weight that differs.
    """
    adapter = isinstance(model, PeftModel)
    config: Any = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    file = Path(checkpoint, ADAPTER if adapter else FULL)
    kind = "an adapter" if adapter else "all weights"
    if not file.is_file():
        raise ValueError(
            f"A checkpoint must hold what is trained here, {kind} in {file.name}. Found no such file in {checkpoint}. It "
            "was saved by a run with other settings of `peft_config`, or by another program."
        )
    strange = [name for name in (*PICKLED, *([FULL] if adapter else [])) if Path(checkpoint, name).exists()]
    if strange:  # Trainer would read them first
        raise ValueError(
            f"A checkpoint must hold the files that this trainer wrote. Found {', '.join(strange)} beside them in "
            f"{checkpoint}. Something else put them there: remove them, or do not use the checkpoint."
        )
    wanted = get_peft_model_state_dict(model) if adapter else model.state_dict()
    expected = {name: list(value.shape) for name, value in wanted.items()}
    found = _shapes(file)
    names = sorted(found.keys() ^ expected.keys()) or sorted(n for n in found if found[n] != expected[n])
    if names:
        raise ValueError(
            f"A checkpoint must be of the same model and adapter. Found {len(names)} weights in {file} that differ from "
            f"this model's, e.g. {names[0]}: {found.get(names[0], 'none')} in the checkpoint, "
            f"{expected.get(names[0], 'none')} in the model. Use the settings that it was saved with, or start anew."
        )
    if adapter:
        _check_scale(file.with_name("adapter_config.json"), config)


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Weights must be a safetensors file. Found {file}, which is none: {error}. Take another checkpoint."
        ) from error


def _check_scale(file: Path, config: Any) -> None:
    """The scale of an adapter is in none of its weights."""
    saved = read_object(file) if file.is_file() else {}
    for name in ("lora_alpha", "use_rslora"):
        mine = getattr(config, name, None)
        if name in saved and saved[name] != mine:
            raise ValueError(
                f"An adapter resumes with the `{name}` that it was saved with, {saved[name]}. Found {mine}. Correct "
                "`peft_config`."
            )


@contextmanager
def nothing_but_tensors(checkpoint: str | Path) -> Iterator[None]:
    """While PyTorch reads the optimizer and random states, which it refuses to unpickle beyond tensors and numbers.

    Raises:
        ValueError: instead of PyTorch's advice to load the file nevertheless.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"A checkpoint must hold tensors and numbers only. Found something else in {checkpoint}, which was not run: "
            f"{str(error).splitlines()[0]}. The file was not written by this trainer: do not use the checkpoint."
        ) from error
