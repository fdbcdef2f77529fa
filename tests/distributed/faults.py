"""Training in which something breaks, on one rank."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import movement
from training import dark, make_trainer, red, weights_of
from transformers import TrainerCallback

from trl_apex.trainers.callbacks import InterruptCallback
from trl_apex.trainers.manifest import PARTIAL, finalize


def constant(images, **kwargs):
    """Says nothing about any image."""
    return [0.5] * len(images)


def train_with_a_bad_gradient(
    rank: int, output_dir: str, bad_rank: int, bad_step: int, **options: Any
) -> dict[str, Any]:
    """Three updates, the loss of one of which is not a number on one rank."""
    if options.get("bf16") or options.get("fp16"):
        _prepare_half_precision()
    trainer, seen = make_trainer(output_dir, **{"max_steps": 3, "max_nonfinite_updates": 5, **options}), []
    compute = trainer._compute_loss

    def loss(model, inputs):
        bad = rank == bad_rank and trainer.state.global_step == bad_step
        return compute(model, inputs) * (float("nan") if bad else 1.0)

    class Weights(TrainerCallback):
        def on_step_begin(self, *arguments, **others):
            seen.append(weights_of(trainer))

        on_train_end = on_step_begin

    trainer._compute_loss = loss
    trainer.add_callback(Weights())
    trainer.train()
    return {
        "finite": all(bool(np.isfinite(w).all()) for w in seen[-1].values()),
        "moved": [movement(a, b) for a, b in zip(seen, seen[1:], strict=False)],
        "skipped": [e.get("skipped_updates/nonfinite", 0.0) for e in trainer.state.log_history if "loss" in e],
        "overflowed": [e.get("skipped_updates/overflow_rate") for e in trainer.state.log_history if "loss" in e],
    }


def _prepare_half_precision() -> None:
    """DeepSpeed's bf16 as older releases have it, and its fp16 on any CPU."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True
    CPU_Accelerator.is_fp16_supported = lambda self: True
    DeepSpeedBF16Config.model_fields["check_grad_overflow"].default = False
    DeepSpeedBF16Config.model_rebuild(force=True)


def stop_on_one_rank(rank: int, output_dir: str, event: str, step: int, interrupted: bool = False) -> None:
    """Three iterations of an update each, in which rank 1 asks to stop. `interrupted`: rank 0 got a signal meanwhile."""
    trainer = make_trainer(output_dir, max_steps=3, baseline_prompts=0, eval_prompts=["red"] * 2)
    interrupt = InterruptCallback()
    interrupt.trainer = trainer
    trainer.callback_handler.callbacks.insert(0, interrupt)

    def ask(args, state, control, **others):
        if state.global_step == step and rank == 1:
            trainer.request_stop("seen enough")
        interrupt.requested |= interrupted and state.global_step == step and rank == 0

    callback = TrainerCallback()
    setattr(callback, event, ask)
    trainer.add_callback(callback)
    trainer.train()


class BreaksOnRank:
    """A reward that is sound but for its second call on rank 1, in which it does something else.

    Args:
        how (`str`): "wrong" returns too few numbers, a user's bug; "raise" fails as a network may; "die" ends the process;
            "never" is sound.
    """

    __name__ = "breaks"

    def __init__(self, how: str):
        self.how, self.calls = how, 0

    def __call__(self, images, **kwargs):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 2:
            if self.how == "wrong":
                return []
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raise":
                raise OSError("the server is gone")
        return images[:, 1].mean((1, 2)).tolist()


def train_with_a_broken_reward(rank: int, output_dir: str, how: str, resume=None, **options: Any) -> dict[str, Any]:
    """Four updates with a checkpoint each; the reward breaks in the second iteration on rank 1."""
    values = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "log_completions": False,
        "baseline_prompts": 0,
    }
    trainer = make_trainer(output_dir, rewards=(red, BreaksOnRank(how)), **values | options)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "failures": [e["reward_failures/breaks"] for e in trainer.state.log_history if "loss" in e],
        "step": trainer.state.global_step,
    }


def evaluate_out_of_memory(rank: int, output_dir: str, **options: Any) -> None:
    """An evaluation at the start of training, in which rank 1 has no memory for its second batch."""
    trainer = make_trainer(output_dir, eval_on_start=True, eval_prompts=["red"] * 6, **options)
    decode, calls = trainer.policy.decode, []

    def full(latents):
        calls.append(latents)
        if rank == 1 and len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(latents)

    trainer.policy.decode = full
    trainer.train()


def log_on_one_rank(images, log_metric=None, log_extra=None, **kwargs):
    """A reward that logs where it has something to log, which is on one rank."""
    if os.environ["RANK"] == "1":
        log_metric("only_here", 3.0)
        log_extra("note", ["seen"] * len(images))
    return images[:, 1].mean((1, 2)).tolist()


def train_with_uneven_logs(rank: int, output_dir: str) -> list[float]:
    trainer = make_trainer(output_dir, rewards=(red, log_on_one_rank))
    trainer.train()
    return [e["only_here"] for e in trainer.state.log_history if "loss" in e]


def train_with_unequal_aggregators(rank: int, output_dir: str) -> None:
    """Rank 1 loses track of the priorities before the second checkpoint."""
    trainer = make_trainer(output_dir, max_steps=2, save_strategy="steps", save_steps=1)
    compute = trainer._compute_advantages

    def advantages(rewards, group_ids):
        if rank == 1 and trainer.state.global_step == 1:
            rewards = rewards + torch.rand_like(rewards)
        return compute(rewards, group_ids)

    trainer._compute_advantages = advantages
    trainer.train()


def save_until_killed(rank: int, output_dir: str, seed: int) -> None:
    """Publish one checkpoint after another."""
    Path(output_dir, "pid").write_text(str(os.getpid()))
    source = random.Random(seed)
    for step in range(1, 100_000):
        partial = Path(output_dir, PARTIAL, f"checkpoint-{step % 7}")
        for name in ("weights", "optimizer", "state/rank0"):
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for _ in range(source.randrange(1, 20)):
                    file.write(source.randbytes(50_000))
                    file.flush()
        finalize(partial, Path(output_dir, f"checkpoint-{step % 7}"), world_size=1)


def train_until_killed(rank: int, output_dir: str) -> None:
    """Checkpoints without end."""
    Path(output_dir, "pid").write_text(str(os.getpid()))

    def slow(images, **kwargs):
        time.sleep(0.05)
        return dark(images)

    slow.__name__ = "dark"
    make_trainer(output_dir, rewards=(red, slow), max_steps=10_000, save_strategy="steps", save_steps=1).train()
