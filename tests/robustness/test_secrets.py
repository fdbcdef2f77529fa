"""A run with three secrets, and a search for them in everything that it leaves, logs, prints and uploads."""

import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from loopback import running
from loopback_hub import WRITER, running_hub
from peft import LoraConfig
from tiny_runs import redness, tiny_args, tiny_pipeline

from trl_apex import APEXTrainer
from trl_apex.cli import main
from trl_apex.redact import redacted

FROM_ENVIRONMENT, OF_THE_SERVER = "hf_environmentsecretsecret", "reward-server-secret-0123456789abcdef"


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as server:
        yield server


def leaks(folder: Path, secrets: dict[str, str]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [f"{name} in {path}" for path in files for name, s in secrets.items() if s.encode() in path.read_bytes()]


@pytest.mark.filterwarnings("ignore")
def test_no_secret_is_written_logged_printed_or_uploaded(hub, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", FROM_ENVIRONMENT)
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", OF_THE_SERVER)
    secrets = {"hub token": WRITER, "HF_TOKEN": FROM_ENVIRONMENT, "reward server's token": OF_THE_SERVER}
    run = tmp_path / "run"
    with running([redness], token=OF_THE_SERVER) as url:
        code = main(
            [
                "train", "--model", "tiny", "--dataset", "tiny", "--max_prompts", "8", "--output_dir", str(run),
                "--rewards", f"remote(url='{url}', name='redness')", "jpeg_compressibility",
                "--use_cpu", "true", "--lora_r", "2", "--num_generations", "2", "--generation_batch_size", "4",
                "--per_device_train_batch_size", "4", "--num_inference_steps", "2", "--guidance_scale", "1",
                "--max_sequence_length", "12", "--max_steps", "3", "--save_steps", "1", "--logging_steps", "1",
                "--push_to_hub", "true", "--hub_token", WRITER, "--hub_model_id", "me/apex",
                "--hub_strategy", "all_checkpoints", "--report_to", "tensorboard",
            ]
        )  # fmt: skip
    printed = "".join(capfd.readouterr())
    assert code == 0, printed[-2000:]
    names = {path.name for path in run.rglob("*")}
    assert {
        "README.md",
        "report.html",
        "config.json",
        "environment.json",
        "checkpoint-3",
        "training_args.bin",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert leaks(run, secrets) == []
    uploaded = hub.repos["me/apex"].files
    assert "README.md" in uploaded
    assert not [
        (name, path) for path, content in uploaded.items() for name, s in secrets.items() if s.encode() in content
    ]
    assert not [name for name, secret in secrets.items() if secret in printed or secret in caplog.text]
    assert "--hub_token (hidden)" in (run / "environment.json").read_text()


def test_the_search_finds_what_is_there(tmp_path):
    for number in range(21):
        (tmp_path / str(number)).write_text("hf_secret" if number == 7 else "nothing")
    assert leaks(tmp_path, {"token": "hf_secret"}) == [f"token in {tmp_path / '7'}"]


@pytest.mark.parametrize(
    "text",
    [
        "--hub_token plain1", "--hub_token=plain1", "--api-key 'plain1'", "--password plain1", '--hub_token "plain1 x"',
        "--model_init_kwargs '{\"token\": \"plain1\"}'", "hub_token: plain1", "password=plain1",
        "{'api_key': 'plain1'}", "x-api-key: plain1", "Authorization: Basic plain1", "b'Bearer plain1'",
        "https://me:plain1@host/x", "https://plain1@host/x", "https://me:pl@plain1@host/x", "https://h/x?a=1&api_key=plain1",
        "https://h/x?X-Amz-Signature=plain1&a=1", "the key in_the/environment", "the key in_the%2Fenvironment",
    ],
)  # fmt: skip
def test_a_secret_is_hidden_in_whatever_text(text, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "in_the/environment")
    shown = redacted(f"trl-apex train {text} --max_steps 3 --max_tokens 512 a token 'x' prompt")
    assert not {"plain1", "in_the/environment", "in_the%2Fenvironment"} & set(re.split(r"[^\w/%]+", shown)), shown
    assert "--max_steps 3 --max_tokens 512 a token 'x' prompt" in shown


def test_a_token_for_loading_the_pipeline_is_not_kept(tmp_path):
    args = tiny_args(
        tmp_path, model_init_kwargs={"token": "of-the-hub"}, max_steps=1, save_strategy="steps", save_steps=1
    )
    folder = tmp_path / "tiny"
    tiny_pipeline().save_pretrained(folder)
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    trainer = APEXTrainer(str(folder), redness, args, data, peft_config=LoraConfig(r=2))
    trainer.train()
    assert args.model_init_kwargs == {"token": "of-the-hub"}
    assert leaks(tmp_path, {"token": "of-the-hub"}) == []
