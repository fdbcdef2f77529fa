"""From training to another machine's pipeline, through a hub on loopback; with every `hub_strategy`."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from loopback_hub import WRITER, Hub
from peft import LoraConfig
from tiny_runs import contrast, redness, tiny_trainer

from trl_apex import APEXTrainer
from trl_apex.diffusion.rollout import evaluation_noise
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.trainers.publishing import PushError
from trl_apex.trainers.weights import LORA_FILE

PROMPTS = ['a red circle with " C A T "', "a blue square"]
DOWNLOAD = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
pipeline.load_lora_weights("me/apex")
latents = torch.ones(1, 16, 8, 8)
image = pipeline("a blue square", latents=latents, num_inference_steps=2, guidance_scale=1.0, output_type="latent").images
torch.save(image, sys.argv[2])
"""


def make_trainer(output_dir: Path, lora: bool = True, **options) -> APEXTrainer:
    values = {"per_device_train_batch_size": 8, "generation_batch_size": 8, "num_generations": 4, "max_steps": 2}
    values |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "pipeline": build_pipeline(0)}
    values |= {"hub_token": WRITER, "hub_model_id": "me/apex", **options}
    return tiny_trainer(output_dir, lora=LoraConfig(r=4, lora_alpha=16) if lora else None, **values)


def test_a_pushed_adapter_draws_the_same_on_another_machine(hub: Hub, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    assert trainer.push_to_hub(private=True) == f"{hub.url}/me/apex"
    repo = hub.repos["me/apex"]
    assert repo.private and len(repo.commits) == 1
    card = repo.files["README.md"].decode()
    assert "load_lora_weights" in card and "| redness | 1.0 |" in card and "library_name: diffusers" in card
    assert json.loads(repo.files["aggregator_state.json"])["objectives"] == ["redness", "contrast"]
    assert {"figures/priorities.png", "figures/rewards.png", "trainer_state.json"} <= set(repo.files)
    assert not [path for path, content in repo.files.items() if WRITER.encode() in content]

    build_pipeline(0).save_pretrained(tmp_path / "base")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    command = [sys.executable, "-c", DOWNLOAD, str(tmp_path / "base")]
    done = subprocess.run([*command, str(tmp_path / "image.pt")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    elsewhere = torch.load(tmp_path / "image.pt", weights_only=True)

    local, untrained = build_pipeline(0), build_pipeline(0)
    local.load_lora_weights(tmp_path / "run")
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": torch.ones(1, 16, 8, 8)}
    arguments["output_type"] = "latent"
    here, without = (each("a blue square", **arguments).images for each in (local, untrained))
    # Weights that lie elsewhere in memory may be added in another order; the adapter changes the image a thousand times as much.
    torch.testing.assert_close(elsewhere, here, rtol=0, atol=1e-5)
    assert (elsewhere - without).abs().max() > 0.01


def test_the_average_that_was_evaluated_is_what_is_uploaded(hub: Hub, tmp_path: Path) -> None:
    seen = []

    def record(images, **columns):
        seen.append(images.clone())
        return [0.0] * len(images)

    options = {"ema_decay": 0.5, "push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}
    trainer = make_trainer(tmp_path / "run", monitors=[record], **options)
    trainer.train()
    during = dict(hub.repos["me/apex"].files)
    assert "adapter_model.safetensors" not in during, "these are the last weights, to resume from"
    trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
    trainer.save_model()  # uploads
    assert "(decay 0.5)" in hub.repos["me/apex"].files["README.md"].decode()
    for name, files in (("during", during), ("after", hub.repos["me/apex"].files)):
        pipeline, folder = build_pipeline(0), tmp_path / name
        folder.mkdir()
        (folder / LORA_FILE).write_bytes(files[LORA_FILE])
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
        noise = evaluation_noise(trainer.args.seed, [0, 1], trainer.latent_shape)
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 12, "output_type": "latent"}
        images = trainer.policy.decode(pipeline(PROMPTS, latents=noise, height=32, width=32, **call).images)
        assert (images - torch.cat(seen)).abs().max() < 1e-5


def test_a_repository_in_place_of_the_message_is_refused_and_by_its_name_it_is_the_target(hub: Hub, tmp_path) -> None:
    trainer = make_trainer(tmp_path / "run", hub_model_id=None, max_steps=1)
    with pytest.raises(ValueError, match='Pass hub_model_id="my-org/face"'):
        trainer.push_to_hub("my-org/face")
    assert hub.repos == {}
    trainer.push_to_hub("First", hub_model_id="me/face")
    assert list(hub.repos) == ["me/face"] and hub.repos["me/face"].commits == ["First"]


@pytest.mark.parametrize(
    "strategy,folders",
    [
        pytest.param("end", set(), marks=pytest.mark.slow),
        pytest.param("every_save", set(), marks=pytest.mark.slow),
        ("checkpoint", {"last-checkpoint"}),
        pytest.param("all_checkpoints", {"checkpoint-1", "checkpoint-2"}, marks=pytest.mark.slow),
    ],
)
def test_strategies(hub: Hub, tmp_path: Path, strategy: str, folders: set[str]) -> None:
    trainer = make_trainer(tmp_path / "run", push_to_hub=True, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    repo = hub.repos["me/apex"]
    assert ("pytorch_lora_weights.safetensors" in repo.files) == (strategy != "end")
    assert len(repo.commits) == (0 if strategy == "end" else 2)
    trainer.save_model()
    assert "pytorch_lora_weights.safetensors" in repo.files
    assert {path.split("/")[0] for path in repo.files if "checkpoint" in path} == folders
    for folder in folders:
        assert f"{folder}/optimizer.pt" in repo.files
    assert not [path for path, content in repo.files.items() if WRITER.encode() in content]
    assert not list((tmp_path / "run").glob(".push-*"))


@pytest.mark.slow
def test_an_uploaded_checkpoint_can_be_resumed_from(hub: Hub, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", push_to_hub=True, hub_strategy="checkpoint", max_steps=1).train()
    copy = tmp_path / "elsewhere" / "checkpoint-1"
    for path, content in hub.repos["me/apex"].files.items():
        if path.startswith("last-checkpoint/"):
            target = copy / path.removeprefix("last-checkpoint/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    trainer = make_trainer(tmp_path / "elsewhere", hub_token=None)
    trainer.train(resume_from_checkpoint=str(copy))
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_full_fine_tuning_uploads_what_diffusers_loads(hub: Hub, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", lora=False, max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["me/apex"].files
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(files)
    assert "AutoModel.from_pretrained" in files["README.md"].decode()


def test_a_wrong_token_is_named_before_any_compute(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PushError, match="does not accept the token"):
        make_trainer(tmp_path / "run", push_to_hub=True, hub_token="hf_wrongwrongwrong")


def test_a_cut_in_the_middle_of_training_loses_nothing(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", push_to_hub=True, hub_strategy="every_save", hub_always_push=True)
    hub.fail("cut", 1000)
    caplog.set_level(logging.WARNING)
    trainer.train()
    assert trainer.state.global_step == 2, "training goes on without the hub"
    assert "the connection to http://127.0.0.1" in caplog.text and WRITER not in caplog.text
    with pytest.raises(PushError, match="Nothing is lost"):
        trainer.push_to_hub()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    hub.fail("", 0)
    trainer.push_to_hub()
    assert "pytorch_lora_weights.safetensors" in hub.repos["me/apex"].files


SMALL = {
    r"\"stabilityai/[^\"]*\"": '"tiny"',
    r"reward_funcs=\[.*\]": "reward_funcs=[redness, contrast]",
    r"train_dataset=load_dataset\(.*?\)(\.\w+\(.*?\))?,": "train_dataset='tiny',",
    r"num_generations=\d+": "num_generations=2",
    r"generation_batch_size=\d+": "generation_batch_size=4",
    r"per_device_train_batch_size=\d+": "per_device_train_batch_size=4",
    r"updates_per_iteration=\d+": "updates_per_iteration=1",
    "bf16=True": "bf16=False, use_cpu=True, max_steps=1, num_inference_steps=4, hub_token=WRITER",
    r"\"you/": '"me/',
}


@pytest.mark.parametrize("page, repo", [("README.md", "me/sd35-apex"), ("docs/index.md", "me/run")])
def test_the_pages_code_that_pushes_runs_at_toy_size(
    page: str, repo: str, hub: Hub, tmp_path: Path, monkeypatch
) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    (code,) = [block for block in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL) if "push_to_hub" in block]
    for real, small in SMALL.items():
        code = re.sub(real, small, code)
    monkeypatch.chdir(tmp_path)
    exec(code, {"redness": redness, "contrast": contrast, "WRITER": WRITER})
    assert "pytorch_lora_weights.safetensors" in hub.repos[repo].files
