"""The demo: train the tiny pipeline on four rewards at once, and show what came of it."""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from .diffusion.rollout import evaluation_noise
from .evaluation import compare
from .report import save_samples, write_figures, write_report
from .tiny.heldout import heldout_metrics
from .tiny.prompts import tiny_prompts
from .tiny.world import load_tiny_pipeline, tiny_rewards
from .trainers.apex import APEXTrainer
from .trainers.callbacks import ProgressCallback
from .trainers.config import APEXConfig
from .trainers.inputs import Sources
from .trainers.publishing import refresh_model_card
from .trainers.weights import LORA_FILE

HELD_OUT = ("exact_word", "attributes")
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


def demo_config(output_dir: str | Path, seed: int = 0, **overrides: Any) -> APEXConfig:
    """The demo's settings: 8 prompts x 8 images an iteration, trained on 4 noise levels each with DiffusionNFT."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": False,
        "per_device_train_batch_size": 64,
        "generation_batch_size": 64,
        "num_generations": 8,
        "num_inference_steps": 6,
        "guidance_scale": 1.0,
        "max_sequence_length": 12,
        "loss_type": "nft",
        "timesteps_per_image": 4,
        "timestep_batch_size": 4,
        "num_iterations": 2,
        "beta": 1e-4,
        "rollout_batch_size": 64,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_steps": 64,
        "warmup_iterations": 1,
        "ramp_iterations": 1,
        "logging_steps": 2,
        "save_steps": 32,
        "save_total_limit": 1,
        "eval_num_inference_steps": 6,
        "per_device_eval_batch_size": 48,
        "disable_tqdm": True,
    }
    return APEXConfig(**{**settings, **overrides})


def held_out_monitors() -> list:
    """The held-out classifiers as reward functions for `monitor_funcs`: they are reported, never trained on."""

    def monitor(metric: str):
        def score(prompts, images, word, colour, shape, **others):
            return heldout_metrics(images, {"word": word, "colour": colour, "shape": shape})[metric]

        score.__name__ = metric
        return score

    return [monitor(metric) for metric in HELD_OUT]


def demo_adapter() -> LoraConfig:
    """The adapter that the demo trains."""
    return LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))


def run_demo(
    output_dir: str | Path = "runs/demo",
    seed: int = 0,
    test_prompts: int = 192,
    console: Console | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train, evaluate base and tuned on held-out prompts with the same noise, reload the adapter, write the report.

    Adapter, checkpoints, `summary.json`, `report.html` and PNGs go to `output_dir`; the summary is returned as well.
    `overrides` are other values for fields of [`APEXConfig`], e.g. `max_steps`.
    """
    console, output, started = console or Console(), Path(output_dir), time.perf_counter()
    if missing := [name for name in ("rapidocr", "onnxruntime", "matplotlib", "jinja2") if find_spec(name) is None]:
        raise ImportError(f'The demo needs {", ".join(missing)}. Run `pip install "trl_apex[demo]"`.')
    quiet()
    output.mkdir(parents=True, exist_ok=True)
    config, rewards = demo_config(output, seed, **overrides), tiny_rewards()
    names = [reward.__name__ for reward in rewards]
    trainer = APEXTrainer(
        load_tiny_pipeline(),
        rewards,
        config,
        tiny_prompts("train", 1024, seed),
        eval_dataset=tiny_prompts("test", test_prompts),
        peft_config=demo_adapter(),
        callbacks=[ProgressCallback(names, console)],
        monitor_funcs=held_out_monitors(),
    )
    trainer.sources, trainer.command = Sources("tiny", "tiny", "tiny", ["tiny"]), "trl-apex demo"
    trainer.remove_callback(transformers.PrinterCallback)  # the progress lines say it
    steps = config.max_steps
    console.print(f"A tiny Stable Diffusion 3 pipeline, four rewards, {steps} updates. Evaluating the base ...")
    seconds = {"setup": time.perf_counter() - started}

    def timed(name: str, call: Callable[[], Any]) -> None:
        before = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - before

    timed("evaluate_base", trainer.evaluate)
    base = trainer.eval_records
    timed("train", trainer.train)  # evaluates at the end
    tuned = trainer.eval_records
    seconds["evaluate_tuned"] = trainer.state.log_history[-1]["eval_runtime"]
    seconds["train"] -= seconds["evaluate_tuned"]
    trainer.save_model()
    check_adapter(trainer, tuned)
    seconds["total"] = time.perf_counter() - started

    before, after = (
        torch.tensor([[row["rewards"][name] for name in (*names, *HELD_OUT)] for row in rows], dtype=torch.float64)
        for rows in (base, tuned)
    )
    summary = {**compare([*names, *HELD_OUT], before, after, len(names)), "seconds": seconds}
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    save_samples(output / "samples", base, tuned, count=24)
    report, figures = write_report([output]), write_figures(output)
    refresh_model_card(output)
    console.print("", table(summary), sep="\n")
    console.print(f"Adapter, pictures and numbers: {output}/ ({len(figures)} figures); all on one page: {report}")
    return summary


def quiet() -> None:
    """Leave the terminal to the demo's own lines."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def check_adapter(trainer: APEXTrainer, tuned: list[dict[str, Any]], count: int = 8) -> None:
    """Load the saved adapter into a fresh pipeline, as a user would, and compare its images with the trained model's."""
    args, records, pipeline = trainer.args, tuned[:count], load_tiny_pipeline()
    pipeline.load_lora_weights(args.output_dir, weight_name=LORA_FILE)
    images = pipeline(
        [record["prompt"] for record in records],
        latents=evaluation_noise(args.seed, [record["row"] for record in records], trainer.latent_shape),
        num_inference_steps=args.eval_num_inference_steps,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
    ).images
    for record, image in zip(records, images, strict=True):
        difference = np.abs(np.asarray(record["image"], dtype=float) - np.asarray(image)).max()
        if difference > 3:  # of 255: float sums in another order
            raise RuntimeError(
                f"The reloaded adapter must draw what the trained model drew for {record['prompt']!r}. Found images that "
                f"differ by up to {difference:.0f} of 255. The adapter in {args.output_dir} is not to be trusted."
            )


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    result = Table(title="Held-out prompts, same noise before and after")
    for name in ("", "base", "tuned", "gain (base stds)", "± SE"):
        result.add_column(name, justify="left" if not name else "right")
    for kind in ("objectives", "held_out"):
        for name, row in summary[kind].items():
            label = name if kind == "objectives" else f"[dim]{name} (not trained on)[/dim]"
            gain, error = row["gain"], row["gain_se"]
            shown = ["-", "-"]  # where the base scored the same on every prompt
            if gain is not None and error is not None:
                colour = "green" if gain > 2 * error else "red" if gain < -2 * error else "default"
                shown = [f"[{colour}]{gain:+.2f}[/{colour}]", f"{error:.2f}"]
            result.add_row(label, f"{row['base']:.3f}", f"{row['tuned']:.3f}", *shown)
    return result
