"""Different rewards for different prompts, in one run, on a CPU, in about a minute.

    python examples/mixed_prompts.py

One file of prompts with optional columns: some ask for a word (`target`), some for a colour (`colour`). Each reward scores
the rows that have its column and returns None for the others; two rewards score all images. `prompt_mix` puts both kinds
in every iteration. The pipeline is the tiny world's, a real StableDiffusion3Pipeline of 1.6 M parameters.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch
from peft import LoraConfig

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.prompts import load_prompts
from trl_apex.tiny.prompts import COLOURS, RGB, SHAPES, tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards


def right_colour(images, colour, **kwargs):
    """How much of its colour an image has; None for a row without a `colour`, which is not the same as a score of 0."""
    scores = []
    for image, name in zip(images, colour, strict=True):
        if name is None:
            scores.append(None)
        else:
            wanted = torch.tensor(RGB[name], dtype=image.dtype, device=image.device)
            scores.append(float((image.mean((1, 2)) * (2 * wanted - 1)).mean()))
    return scores


def write_prompts(path: Path) -> None:
    """Two kinds of rows in one file; a column that a row does not have is left out."""
    rows = [{"prompt": row["prompt"], "kind": "word", "target": row["word"]} for row in tiny_prompts("train", 48)]
    rows += [
        {"prompt": f"a {colour} {shape}", "kind": "colour", "colour": colour} for colour in COLOURS for shape in SHAPES
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> APEXTrainer:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", type=int, default=12)
    parser.add_argument("--output_dir", default="runs/mixed_prompts")
    options = parser.parse_args(arguments)
    prompts = Path(options.output_dir) / "prompts.jsonl"
    write_prompts(prompts)
    args = APEXConfig(
        output_dir=options.output_dir,
        use_cpu=True,
        max_steps=options.max_steps,
        prompt_mix={"word": 0.5, "colour": 0.5},  # shares of the column `kind`
        num_generations=8,
        generation_batch_size=32,  # 2 prompts of each kind x 8 images
        per_device_train_batch_size=32,
        updates_per_iteration=1,
        num_inference_steps=6,
        sde_window_size=3,
        guidance_scale=1.0,
        max_sequence_length=12,  # tokens of a prompt; the default is for the full-size model
        epsilon=1e-3,
        warmup_iterations=3,
        ramp_iterations=3,
        logging_steps=3,
        save_strategy="no",
    )
    ocr, pickscore, _, aesthetic = tiny_rewards()
    trainer = APEXTrainer(
        model=load_tiny_pipeline(),
        reward_funcs=[ocr, right_colour, pickscore, aesthetic],
        args=args,
        train_dataset=load_prompts(prompts),
        peft_config=LoraConfig(r=8, lora_alpha=16, init_lora_weights="gaussian"),
    )
    trainer.train()
    trainer.save_model()
    last = [row for row in trainer.state.log_history if "reward" in row][-1]
    print(f"{'objective':<14}{'prompts':>8}{'images':>8}{'priority':>10}")
    for name, priority in trainer.aggregator.priorities.items():
        counts = last[f"rewards/{name}/prompts"], last[f"rewards/{name}/images"]
        print(f"{name:<14}{counts[0]:>8g}{counts[1]:>8g}{priority:>10.2f}")
    return trainer


if __name__ == "__main__":
    main()
