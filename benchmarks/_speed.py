"""The models, the trainer and the clocks that the speed benchmarks share."""

import copy
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from _bench import Phases, cpu_seconds
from _loops import Work, lora
from datasets import Dataset
from probe_cost import transformer
from torch import nn

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.rewards import OCRReward
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards

WORK = {
    "tiny": Work(groups=1, group=8, batch=8, side=32, rank=16),
    "mid": Work(groups=1, group=8, batch=8, side=32),
}
SMOKE = Work(groups=1, group=2, batch=2, side=32, steps=4, rank=4)


def quiet() -> None:
    """One thread, and a terminal without progress bars."""
    torch.set_num_threads(1)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


class Model:
    """A pipeline of which every run gets a transformer of its own over the same frozen weights."""

    def __init__(self, name: str):
        self.name = name
        self.pipeline = load_tiny_pipeline() if name == "tiny" else mid_pipeline()

    def fresh(self) -> Any:
        """A pipeline for one run."""
        own = copy.copy(self.pipeline)
        own.register_modules(transformer=copy.deepcopy(self.pipeline.transformer), scheduler=self.pipeline.scheduler)
        pairs = zip(own.transformer.parameters(), self.pipeline.transformer.parameters(), strict=True)
        for mine, frozen in pairs:
            mine.data = frozen.data
        return own

    def fresh_copy(self) -> Any:
        """The same with weights of its own, to change their precision."""
        own = self.fresh()
        own.register_modules(transformer=copy.deepcopy(self.pipeline.transformer))
        return own

    def sizes(self) -> dict[str, float]:
        """Millions of parameters of each part."""
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        return {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}


def mid_pipeline() -> Any:
    """Stable Diffusion 3 with the 118 M transformer of `probe_cost.py` and 77 M of text encoders, random weights.

    Stable Diffusion 3.5 medium has twice as many weights in its text encoders as in its transformer, so that the prompt cache
    is undersold here, if anything.
    """
    pipeline = build_pipeline(0)
    torch.manual_seed(0)
    clip = copy.deepcopy(pipeline.text_encoder.config)
    clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers = 320, 1280, 6
    clip.num_attention_heads, clip.projection_dim = 5, 64
    t5 = copy.deepcopy(pipeline.text_encoder_3.config)
    t5.d_model, t5.d_ff, t5.d_kv, t5.num_heads, t5.num_layers = 640, 1664, 64, 10, 12
    pipeline.register_modules(
        transformer=transformer("100M"),
        text_encoder=transformers.CLIPTextModelWithProjection(clip),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip),
        text_encoder_3=transformers.T5EncoderModel(t5),
    )
    return pipeline


def serial_rewards() -> list:
    """The four rewards with one image at a time in the OCR, as in the field."""
    return [OCRReward(confidence=True, workers=1), *tiny_rewards()[1:]]


def prompts(count: int) -> list[str]:
    return list(tiny_prompts("train", count)["prompt"])


class PassCounter:
    """Rows that went through a transformer: forwards, those with a graph, and backwards."""

    def __init__(self, module: nn.Module):
        self.rows = {"forwards": 0, "backwards": 0}
        module.register_forward_hook(self._count, with_kwargs=True)

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted, self.rows = self.rows, dict.fromkeys(self.rows, 0)
        return counted

    def _count(self, _module, arguments, keywords, output) -> None:
        rows = len(arguments[0] if arguments else keywords["hidden_states"])
        self.rows["forwards"] += rows
        prediction = output[0]
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: self._backward(len(gradient)))

    def _backward(self, rows: int) -> None:
        self.rows["backwards"] += rows


class TrainerRun:
    """An APEXTrainer that trains one iteration whenever asked, on a thread of its own; `close()` must follow."""

    def __init__(self, pipeline: Any, rewards: list, texts: list[str], work: Work, seed: int, **overrides: Any):
        self.phases = Phases()
        self._folder = tempfile.TemporaryDirectory()
        settings: dict[str, Any] = {
            "output_dir": self._folder.name,
            "use_cpu": True,
            "seed": seed,
            "per_device_train_batch_size": work.batch,
            "generation_batch_size": work.samples,
            "rollout_batch_size": work.batch,
            "updates_per_iteration": 1,
            "num_generations": work.group,
            "num_inference_steps": work.steps,
            "guidance_scale": work.guidance,
            "noise_level": work.noise_level,
            "height": work.side,
            "width": work.side,
            "max_sequence_length": work.text,
            "learning_rate": work.learning_rate,
            "multi_objective_aggregation": "sum_then_normalize",
            "shuffle_dataset": False,
            "max_steps": 10**6,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        config = APEXConfig(**{**settings, **overrides})
        started = cpu_seconds()
        self.trainer = APEXTrainer(
            pipeline, rewards, config, Dataset.from_dict({"prompt": texts}), peft_config=lora(work)
        )
        self.setup = cpu_seconds() - started
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.trainer.add_callback(_Pause(self))
        self._mark_phases()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._closing = False
        self.gradients: list = []
        self.network = self.trainer.policy.denoiser
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._started = False

    @property
    def seed(self) -> int:
        return self.trainer.args.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.trainer.args.seed = value

    def iteration(self, number: int = 0) -> None:
        """Train one more iteration."""
        self._go.release()
        if not self._started:
            self._started = True
            self._thread.start()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closing = True
        if self._started:
            self._go.release()
            self._thread.join()
        self._folder.cleanup()

    def _train(self) -> None:
        torch.set_num_threads(1)
        try:
            self._go.acquire()
            self.phases.start()
            self.trainer.train()
        except BaseException as error:  # handed to the waiting thread
            self._error = error
        self._done.release()

    def _mark_phases(self) -> None:
        advantages = self.trainer._compute_advantages

        def marked(*arguments, **keywords):
            self.phases.mark("rollout")
            return advantages(*arguments, **keywords)

        self.trainer._compute_advantages = marked


class _Pause(transformers.TrainerCallback):
    """Waits between iterations until the next one is asked for."""

    def __init__(self, run: TrainerRun):
        self.run = run

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # None where the update is skipped, since all images of a group scored the same.
        self.run.gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]

    def on_log(self, args, state, control, **kwargs):  # the last event of a step, after its logs
        run = self.run
        if run._closing:  # the log at the end of training
            return
        run.phases.stop("update")
        run._done.release()
        run._go.acquire()
        if run._closing:
            control.should_training_stop = True
        run.phases.start()


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Processor and wall seconds of a call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    call()
    return cpu_seconds() - cpu, time.perf_counter() - wall
