"""`trl-apex evaluate`."""

import argparse
from pathlib import Path
from typing import Any


def run(arguments: list[str]) -> None:
    """Compare adapters with their base on the same prompts and noise, and write tables, pictures and report."""
    given = _parser().parse_args(arguments)

    from ..evaluate import markdown_table, run_evaluation
    from ..report import write_report
    from .prompt_files import load_prompts
    from .rewards_by_name import load_rewards

    first = Path(given.adapters[0])
    output_dir = Path(given.output_dir or (first if len(given.adapters) == 1 and first.is_dir() else "evaluation"))
    model: Any = given.model
    if model == "tiny":
        from ..tiny.world import load_tiny_pipeline

        model = load_tiny_pipeline()
    results = run_evaluation(
        model,
        given.adapters,
        load_prompts(given.dataset, given.split, None, given.prompt_column, given.max_prompts),
        load_rewards(given.rewards),
        output_dir,
        monitors=load_rewards(given.monitors),
        num_inference_steps=given.steps,
        guidance_scale=given.guidance_scale,
        negative_prompt=given.negative_prompt,
        height=given.height,
        width=given.width,
        max_sequence_length=given.max_sequence_length or (12 if given.model == "tiny" else 256),
        images_per_prompt=given.images_per_prompt,
        batch_size=given.batch_size,
        seed=given.seed,
        ema=given.ema,
    )
    print(f"\n{markdown_table(results)}\nTables and pictures: {output_dir}")
    if len(given.adapters) == 1:
        print(f"Report: {write_report([output_dir])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-apex evaluate", description="Compares tuned models with their base on the same prompts and noise."
    )
    parser.add_argument("adapters", nargs="+", metavar="RUN_DIR", help="run directory, or hub id of an adapter")
    parser.add_argument("--model", required=True, help="the base pipeline: hub id, folder, or 'tiny'")
    parser.add_argument("--dataset", required=True, help="prompts: file, folder, hub id, or 'tiny'")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--prompt-column", default="prompt", help="default: %(default)s")
    parser.add_argument("--max-prompts", type=int, help="use the first so many")
    parser.add_argument("--rewards", nargs="+", required=True, metavar="REWARD", help="as in `trl-apex train`")
    parser.add_argument("--monitors", nargs="+", default=[], metavar="REWARD", help="never trained on, reported apart")
    parser.add_argument("--steps", type=int, default=40, help="denoising steps; default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="1 for none; default: %(default)s")
    parser.add_argument("--negative-prompt", default="", help="default: empty")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--max-sequence-length", type=int, help="text tokens, as in training; default: 256")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="images sampled at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--ema", action="store_true", help="the averaged weights that the run saved")
    parser.add_argument("--output-dir", help="default: RUN_DIR, or evaluation/ for several")
    return parser
