"""Pretraining at toy length: every part learns, is saved and loads again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_apex.rewards.aesthetic import AestheticReward
from trl_apex.rewards.deqa import DeQAReward
from trl_apex.rewards.pickscore import PickScoreReward
from trl_apex.tiny.fit_flow import fit_flow
from trl_apex.tiny.fit_vae import encode_latents, fit_vae, reconstruction_psnr
from trl_apex.tiny.heldout import load_heldout
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.tiny.pretrain import Lengths, pretrain
from trl_apex.tiny.prompts import words
from trl_apex.tiny.render import render_batch, sample_scenes

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
