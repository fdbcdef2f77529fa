"""Image editing with two rewards that conflict by nature, on a CPU, in a few minutes.

    python examples/edit_images.py

`source` rewards an edit that keeps the image, `recoloured` one that follows the instruction. The best edit for the first is
none at all. The pipeline is a real FluxKontextPipeline with the tiny world's VAE and text encoder. Its transformer is small and
random, so it first learns to copy its source or to paint it in any colour; a published model edits already.
"""

from argparse import ArgumentParser
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.diffusion.families import load_policy
from trl_apex.diffusion.losses import add_noise
from trl_apex.prompts.datasets import edits_of
from trl_apex.rewards import SourceReward
from trl_apex.tiny.pipeline import token_ids
from trl_apex.tiny.prompts import COLOURS, RGB, SHAPES, caption, words
from trl_apex.tiny.render import Scene, render
from trl_apex.tiny.world import load_tiny_pipeline, weights_path

SIZE = 32  # pixels


def scene(number: int, colour: str) -> Image.Image:
    """The image of a word and a shape in some colour."""
    return render(Scene(words("train")[number], colour, SHAPES[number % len(SHAPES)]))


def recolourings(first: int, last: int) -> Dataset:
    """Images, each with the caption of the same scene in another colour for an instruction."""
    rows = []
    for i in range(first, last):
        before, after = COLOURS[i % 6], COLOURS[(i + 1 + i // 6 % 5) % 6]  # never the same
        prompt = caption(words("train")[i], after, SHAPES[i % len(SHAPES)])
        rows.append({"prompt": prompt, "colour": after, "source_image": scene(i, before)})
    return Dataset.from_list(rows)


def recoloured(images, colour, source_image, **kwargs):
    """How much more of the wanted colour an image has than its source."""
    scores = []
    for image, name, source in zip(images, colour, source_image, strict=True):
        wanted = 2 * np.array(RGB[name]) - 1  # more of these channels, less of the others
        change = image.mean((1, 2)).numpy(force=True) - np.asarray(source).mean((0, 1)) / 255
        scores.append(float(change @ wanted))
    return scores


def small_kontext() -> FluxKontextPipeline:
    """A `FluxKontextPipeline` with a random transformer, which sees the colours of prompts through T5 alone."""
    world = load_tiny_pipeline()
    transformer = FluxTransformer2DModel(
        in_channels=4 * world.vae.config.latent_channels,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=world.text_encoder_3.config.d_model,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPTextConfig(**sizes, **token_ids(world.tokenizer))
    pipeline = FluxKontextPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=world.vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=world.tokenizer,
        text_encoder_2=world.text_encoder_3,
        tokenizer_2=world.tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def learn_to_paint(pipeline: Any, rows: Dataset, steps: int) -> None:
    """Flow matching: half of the time towards the source, half towards its scene in a random colour, whatever the prompt."""
    policy = load_policy(pipeline)
    embeddings = policy.encode(edits_of(rows, [(SIZE, SIZE)] * len(rows)), 12)
    paintings = [[policy.encode_by_vae(scene(i, colour)) for colour in COLOURS] for i in range(len(rows))]
    targets = torch.stack([torch.cat(colours) for colours in paintings])  # [rows, colours, C, H, W]
    model = policy.denoiser.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = torch.randint(len(rows), (32,))
        batch = {name: value[chosen] for name, value in embeddings.items()}
        clean = targets[chosen, torch.randint(len(COLOURS), (32,))]
        clean[:16] = batch["source"][:16]
        noise, sigmas = torch.randn_like(clean), torch.rand(32)
        velocity = policy.predict(model, add_noise(clean, noise, sigmas), 1000 * sigmas, batch, 1.0)
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"learning to paint: step {step}, loss {loss.item():.3f}")
    model.requires_grad_(False)


def main(arguments: list[str] | None = None) -> APEXTrainer:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--paint_steps", type=int, default=400)
    parser.add_argument("--max_steps", type=int, default=30)
    parser.add_argument("--output_dir", default="runs/edit_images")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    pipeline, rows = small_kontext(), recolourings(0, 128)
    learn_to_paint(pipeline, rows, options.paint_steps)
    args = APEXConfig(
        output_dir=options.output_dir,
        use_cpu=True,
        max_steps=options.max_steps,
        height=SIZE,
        width=SIZE,
        loss_type="nft",  # the final images alone, a third of the work of "grpo" here
        timesteps_per_image=2,
        num_generations=8,
        generation_batch_size=64,  # 8 instructions x 8 images
        per_device_train_batch_size=64,
        updates_per_iteration=1,
        num_inference_steps=6,
        eval_num_inference_steps=6,
        max_sequence_length=12,
        learning_rate=1e-3,
        warmup_iterations=3,
        ramp_iterations=3,
        logging_steps=1,
        save_strategy="no",
    )
    clip = str(weights_path("clip"))
    trainer = APEXTrainer(
        model=pipeline,
        reward_funcs=[SourceReward(clip, clip), recoloured],
        args=args,
        train_dataset=rows,
        eval_dataset=recolourings(128, 160),
        peft_config=LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian"),
    )
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    after = [row for row in trainer.state.log_history if "eval_reward" in row][-1]
    print(f"{'reward':<12}{'before':>8}{'after':>8}{'priority':>10}")
    for name, priority in trainer.aggregator.priorities.items():
        key = f"eval_rewards/{name}/mean"
        print(f"{name:<12}{before[key]:>8.3f}{after[key]:>8.3f}{priority:>10.2f}")
    conflict = [row["conflict/source/recoloured"] for row in trainer.state.log_history if "loss" in row]
    print(f"correlation of the two among images of one instruction: {conflict[-1]:.2f}")
    return trainer


if __name__ == "__main__":
    main()
