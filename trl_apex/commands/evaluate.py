"""`trl-apex evaluate`."""

import argparse
from pathlib import Path


def run(arguments: list[str]) -> None:
    """Compare a tuned model with its base on the same prompts and noise, and write `summary.json`, samples and report."""
    given = _parser().parse_args(arguments)

    from ..evaluation.run import run_evaluation
    from ..report import write_report
    from .prompt_files import load_prompts
    from .rewards_by_name import load_rewards

    output_dir = Path(given.output_dir or given.adapter)
    run_evaluation(
        model=given.model,
        adapter=given.adapter,
        dataset=load_prompts(given.dataset, given.split, None, given.prompt_column, given.max_prompts),
        reward_funcs=load_rewards(given.rewards),
        monitor_funcs=load_rewards(given.monitors),
        output_dir=output_dir,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance_scale,
        images_per_prompt=given.images_per_prompt,
        batch_size=given.batch_size,
        seed=given.seed,
    )
    print(write_report([output_dir]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-apex evaluate", description="Compares a tuned model with its base on the same prompts and noise."
    )
    parser.add_argument("adapter", metavar="RUN_DIR", help="run directory, or hub id of an adapter")
    parser.add_argument("--model", required=True, help="the base pipeline: hub id, folder, or 'tiny'")
    parser.add_argument("--dataset", required=True, help="prompts: file, folder, hub id, or 'tiny'")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--prompt-column", default="prompt", help="default: %(default)s")
    parser.add_argument("--max-prompts", type=int, help="use the first so many")
    parser.add_argument("--rewards", nargs="+", required=True, metavar="REWARD", help="as in `trl-apex train`")
    parser.add_argument("--monitors", nargs="+", default=[], metavar="REWARD", help="never trained on, reported apart")
    parser.add_argument("--steps", type=int, default=40, help="denoising steps; default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=4.5, help="default: %(default)s")
    parser.add_argument("--images-per-prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="images sampled at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output-dir", help="default: RUN_DIR")
    return parser
