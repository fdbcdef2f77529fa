"""An exponential moving average of the trained weights."""

from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..distributed import full_trainable_weights, local_shard, set_trainable_weights

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """One step of the average per optimizer step (or every `ema_update_steps`), saved with the checkpoint.

    Args:
        trainer: whose trainable parameters are averaged.
        decay (`float`): 0.9 keeps nine tenths at each step.
        every (`int`): optimizer steps between two steps of the average.
    """

    def __init__(self, trainer, decay: float, every: int):
        self.trainer, self.decay, self.every = trainer, decay, every
        self._ema: EMAModel | None = None

    def _parameters(self) -> list[nn.Parameter]:
        """What this rank holds of the trainable parameters: views, so that an average written there is used."""
        return [nn.Parameter(local_shard(p)) for p in self.trainer.model.parameters() if p.requires_grad]

    def on_train_begin(self, args, state, control, **kwargs):
        self._ema = EMAModel(self._parameters(), decay=self.decay, min_decay=self.decay)
        if self.trainer.resumed_from is not None:
            self.load(self.trainer.resumed_from)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._ema.step(self._parameters())

    def check(self, checkpoint: str | Path) -> None:
        """Raise ValueError if the average in a checkpoint, where there is one, is not of these weights."""
        file = Path(checkpoint, EMA_FILE)
        if not file.is_file():
            return
        expected = {n.removeprefix("module.") for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        try:
            with safe_open(file, "pt") as content:
                names = sorted((expected | {"optimization_step"}) ^ set(content.keys()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} must be a safetensors file. Found {error}. Take another checkpoint.") from error
        if names:
            raise ValueError(
                f"{file} must hold the average of each trained weight, and its step. Found {len(names)} names in one of the "
                f"file and the model alone, e.g. {names[0]}. Take another checkpoint."
            )

    def load(self, checkpoint: str | Path) -> None:
        """Take the average that a checkpoint holds, if it holds one; every rank must call it."""
        file = Path(checkpoint, EMA_FILE)
        if self._ema is None or not file.is_file():
            return
        stored = load_file(file)
        self._ema.optimization_step = int(stored.pop("optimization_step"))
        self._ema.store(self._parameters())
        set_trainable_weights(self.trainer.model, stored)
        self._ema.shadow_params = [p.detach().clone() for p in self._parameters()]
        self._ema.restore(self._parameters())

    def save(self, directory: str) -> dict[str, Tensor] | None:
        """Write the whole average; every rank must call it, the main process writes.

        Returns:
            `dict`: the averaged weights by name, complete on the main process; None before training.
        """
        if self._ema is None:
            return None
        with self.averaged():
            tensors = full_trainable_weights(self.trainer.model, main_only=True)
        if self.trainer.args.should_save:
            Path(directory).mkdir(parents=True, exist_ok=True)
            step = torch.tensor(self._ema.optimization_step)
            save_file({**tensors, "optimization_step": step}, Path(directory) / EMA_FILE)
        return tensors

    @contextmanager
    def averaged(self):
        """Put the averaged weights into the model for a while."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())
