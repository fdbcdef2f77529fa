"""Pictures to where the numbers go: TensorBoard, Weights & Biases, trackio."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def send_picture(callbacks: Iterable[Any], name: str, picture: Image.Image, step: int) -> None:
    """Log a picture with every tracker that is among a trainer's callbacks and has a run open.

    Args:
        callbacks (`Iterable[transformers.TrainerCallback]`): the trainer's.
        name (`str`): its key.
        picture (`PIL.Image.Image`): what to log.
        step (`int`): optimizer steps so far.

    Note:
        TRL's table of completions holds the images in trackio; in Weights & Biases its cells say "Image" (TRL 1.16,
        wandb 0.31), and TensorBoard has no tables.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({name: wandb.Image(picture), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({name: trackio.Image(picture), "train/global_step": step})
