"""Pretraining at toy length: every part learns, is saved and loads again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tools.tiny_world.generator import encode_latents, fit_flow, fit_vae, reconstruction_psnr
from tools.tiny_world.judges import build_chat_tokenizer, worse_scene
from tools.tiny_world.measure import rendered_figures, sample_images
from tools.tiny_world.pretrain import Lengths, pretrain
from tools.tiny_world.shared import save_pipeline
from trl_apex.rewards.clip import AestheticReward, PickScoreReward
from trl_apex.rewards.deqa import DeQAReward
from trl_apex.tiny.heldout import load_heldout
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.tiny.prompts import tiny_prompts, words
from trl_apex.tiny.render import quality, render_batch, sample_scenes
from trl_apex.tiny.world import load_tiny_pipeline

TOY = Lengths(images=64, vae=2, flow=2, respell=2, clip=2, aesthetic=2, quality=2, heldout=2)


def test_the_command_writes_what_the_rewards_load(tmp_path: Path) -> None:
    pretrain(tmp_path, seed=0, lengths=TOY)
    images, prompts = torch.rand(2, 3, 32, 32), ['a red circle with "CAT"'] * 2
    clip = str(tmp_path / "clip")
    for reward in (
        PickScoreReward(model=clip, processor=clip),
        AestheticReward(clip=clip, head=str(tmp_path / "aesthetic.safetensors")),
        DeQAReward(model=str(tmp_path / "deqa")),
    ):
        assert all(isinstance(score, float) for score in reward(prompts=prompts, completions=images))
    assert load_heldout(tmp_path / "heldout.safetensors")(images)[0].shape == (2, 3, 12)
    assert (tmp_path / "pipeline" / "model_index.json").exists()


@pytest.mark.slow
def test_pretraining_is_seeded(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pretrain(tmp_path / name, seed=0, lengths=replace(TOY, images=32))
    one, two = (load_file(tmp_path / name / "heldout.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_autoencoder_and_the_flow_learn() -> None:
    scenes = sample_scenes(words("train"), 64, seed=0)
    pixels = render_batch(scenes)
    pipeline = build_pipeline(0)
    before = reconstruction_psnr(pipeline.vae, pixels)
    fit_vae(pipeline.vae, pixels, steps=20, batch_size=16)
    assert reconstruction_psnr(pipeline.vae, pixels) > before + 3
    latents = encode_latents(pipeline.vae, pixels)
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05
    weight = pipeline.transformer.proj_out.weight.detach().clone()
    fit_flow(pipeline, latents, [scene.prompt for scene in scenes], steps=4, batch_size=8)
    assert not torch.equal(weight, pipeline.transformer.proj_out.weight)


def test_chat_tokenizer_keeps_levels_single(tmp_path: Path) -> None:
    build_chat_tokenizer("USER: How good? ASSISTANT: It is", ["good", "bad"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokenizer(level, add_special_tokens=False).input_ids for level in ("good", "bad")]
    assert [len(row) for row in ids] == [1, 1] and ids[0] != ids[1]
    assert tokenizer.tokenize("USER: <image>\nHow good?") == ["USER", ":", "<image>", "How", "good", "?"]


def test_worse_scenes_differ_in_caption_or_score_lower() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes(words("train"), 200, seed=1):
        worse = worse_scene(scene, rng)
        assert worse.prompt != scene.prompt or (worse != scene and quality(worse) <= quality(scene))


def test_the_pipeline_survives_saving(tmp_path: Path) -> None:
    prompts = tiny_prompts("test", 4, seed=0)["prompt"][:]
    pipeline = load_tiny_pipeline()
    before = sample_images(pipeline, prompts, seed=0)
    save_pipeline(pipeline, tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample_images(loaded, prompts, seed=0), before)


@pytest.mark.slow
def test_figures_hold_on_noisy_pictures() -> None:
    figures = rendered_figures(300, seed=5)
    assert figures["deqa_rank_correlation"] > 0.55
    assert figures["aesthetic_rank_correlation"] > 0.7
    assert figures["pickscore_prefers_better_image"] > 0.75
    assert figures["heldout_exact_word"] > 0.8
