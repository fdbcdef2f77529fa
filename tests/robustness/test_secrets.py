"""A run with three secrets, and a search for them in everything that it leaves, logs, prints and uploads."""

import logging
from pathlib import Path

import pytest
from loopback import running
from loopback_hub import WRITER, running_hub
from tiny_runs import redness

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
    "text", ["--hub_token plain1", "--hub_token=plain1", "--api-key 'plain1'", "--password plain1"]
)
def test_a_token_on_a_command_line_is_hidden_whatever_its_form(text):
    assert "plain1" not in redacted(f"trl-apex train {text} --max_steps 3")
    assert "--max_steps 3" in redacted(f"trl-apex train {text} --max_steps 3")
