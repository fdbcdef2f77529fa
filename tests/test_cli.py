"""The command line: what it refuses and how, what it records, and that a run can be stopped and resumed."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.numpy import load_file

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.cli import COMMANDS, TRAIN_HELP, all_options, explain, main, train_options
from trl_apex.rewards.registry import REWARDS as BUILT_IN
from trl_apex.rewards.registry import load_rewards
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.trainers.logs import recorded_warnings

REWARDS = """
def red(images, **columns):
    return images[:, 0].mean((1, 2)).tolist()

def dark(images, **columns):
    return (-images.mean((1, 2, 3))).tolist()

class Constant:
    def __init__(self, value=0.0, name="constant"):
        self.value, self.__name__ = value, name

    def __call__(self, prompts, **columns):
        return [self.value] * len(prompts)

number = 3
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with random weights, saved."""
    from trl_apex.tiny.pipeline import build_pipeline

    path = tmp_path_factory.mktemp("models") / "base"
    build_pipeline(0).save_pretrained(path)
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts, rewards and a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "cli_rewards", raising=False)
    (tmp_path / "cli_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text('a red circle with " C A T "\n\na blue square\na green star\na red star\n')
    settings = {
        "model": str(base),
        "dataset": "prompts.txt",
        "rewards": ["cli_rewards:red", "cli_rewards:dark"],
        "output_dir": "out",
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "generation_batch_size": 8,
        "num_generations": 4,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "gradient_accumulation_steps": 2,
        "max_sequence_length": 12,
        "learning_rate": "1e-3",
        "lora_r": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "hub_token": "hf_secretsecretsecret",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def failing(capsys: pytest.CaptureFixture, *arguments: str, code: int = 2) -> str:
    """The one line that a command fails with."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    message = [line for line in lines if line.startswith("trl-apex")]
    assert len(message) == 1 and "Traceback" not in "\n".join(lines), lines
    return message[0]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = "import sys; from trl_apex.cli import main; main([*sys.argv[1:]]); print(*sys.modules)"
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        shown, modules = done.stdout.rstrip().rsplit("\n", 1)
        assert not {"torch", "trl", "transformers", "diffusers", "numpy"} & set(modules.split()), arguments
        assert "--help-all" in shown or arguments != ["train", "--help"]
        assert arguments != ["--help"] or all(command in shown for command in COMMANDS)


def test_the_short_help_of_train_fits_a_screen_and_names_options_that_exist() -> None:
    named = set(re.findall(r"--([a-z_]+)", TRAIN_HELP.replace("--help-all", ""))) - {"config"}
    assert len(named) > 25 and len(TRAIN_HELP.splitlines()) < 60
    everything = all_options()
    for name in named:
        assert f"  --{name} (" in everything, name


def test_the_long_help_has_every_option_once_with_its_default() -> None:
    names = re.findall(r"^  --(\w+) \(", all_options(), re.MULTILINE)
    assert len(names) == len(set(names)) > 150
    assert {"lora_r", "need_coef", "noise_level", "beta", "learning_rate"} <= set(names)
    assert "max_completion_length" not in names, "it has no meaning for images"
    assert "  --lora_r (32)" in all_options()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: trl-apex {command}" in capsys.readouterr().out


def test_a_command_says_nothing_of_packages_that_it_does_not_need(capsys: pytest.CaptureFixture) -> None:
    code = "import diffusers, transformers, sys; from trl_apex.cli import main; main(['env'])\n"
    code += "from transformers import SiglipImageProcessor\n"
    code += "import importlib.util as u\nif u.find_spec('deepspeed'): import deepspeed\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision (not installed)" not in done.stderr + done.stdout
    assert "Setting accelerator" not in done.stderr + done.stdout


def test_an_unknown_command_is_corrected(capsys: pytest.CaptureFixture) -> None:
    assert "Did you mean 'report'?" in failing(capsys, "reprot")


def test_version_and_no_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("trl_apex ")
    assert main([]) == 2


def test_rewards_are_listed_with_what_they_need(capsys: pytest.CaptureFixture) -> None:
    assert main(["rewards"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: re.split("  +", line) for line in lines}
    assert list(rows) == list(BUILT_IN)
    assert re.split("  +", head) == ["name", "range (larger is better)", "memory", "extra", "licence of the weights"]
    assert rows["pickscore"] == ["pickscore", "raw, about 15 to 26", "3.9 GB", "MIT"]
    assert rows["ocr"][:3] == ["ocr", "0 to 1", "ocr"]
    assert all(len(row) >= 3 for row in rows.values()), "each states a range and a licence"


def test_env_tells_versions_and_no_secret(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "python" in text and "HF_TOKEN" in text and "secret" not in text


@pytest.mark.parametrize(
    "change,flags,message",
    [
        ({"lerning_rate": 1}, [], "lerning_rate (did you mean learning_rate?)"),
        ({}, ["run.yaml"], "Found run.yaml. Pass a YAML file as --config FILE."),
        ({}, ["--num-generation", "4"], "--num-generation (did you mean num_generations?)"),
        ({}, ["--max_steps", "three"], "invalid int value: 'three'"),
        ({"max_steps": "three"}, [], "invalid int value: 'three'"),
        ({"num_generations": 1}, [], "`num_generations` must be at least 2"),
        ({"rewards": ["pick_score"]}, [], "Found 'pick_score'. Did you mean 'pickscore'?"),
        ({"rewards": ["cli_rewards:nothing"]}, [], "must be importable"),
        ({"rewards": ["cli_rewards:number"]}, [], "must be callable"),
        ({"rewards": []}, [], "`rewards` must be given"),
        ({"dataset": "absent.txt"}, [], "absent.txt"),
        ({"model": "./absent"}, [], "absent"),
        ({"model": "sd35-medium"}, [], "The folder of a model must exist. Found no sd35-medium."),
        ({"lora_r": -1}, [], "`lora_r` must not be negative"),
        ({"lora_target_modules": ["nothing"]}, [], "nothing"),
        ({"reward_weights": [1.0]}, [], "`reward_weights`"),
        ({"use_cpu": False}, [], "Training needs a GPU, or `use_cpu`"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture, change: dict, flags: list[str], message: str
) -> None:
    settings = yaml.safe_load((folder / "run.yaml").read_text()) | change
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert message in failing(capsys, "train", "--config", "run.yaml", *flags)


def test_the_first_try_names_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    assert "`model` must be given" in failing(capsys, "train")
    given, config = train_options(["--model", "tiny", "--output_dir", "unused"])
    assert config.use_cpu or torch.accelerator.is_available(), "the tiny model needs no GPU"


@pytest.mark.parametrize(
    "content,message",
    [
        ("a: 1\nenv: 3", "and its key `env`, must hold options as"),
        ("[1", "must be valid YAML"),
        ("- a\n- b", "must hold options as"),
        ("model: tiny\ndataset: tiny\nrewards: tinyy\noutput_dir: x", "Found 'tinyy'. Did you mean 'tiny'"),
        ("model: tiny\ndataset: tiny\nrewards:\nmonitors:\nenv:\noutput_dir: x", "`rewards` must be given"),
        (None, "No such file or directory: other.yaml"),
    ],
)
def test_a_broken_configuration_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture, content: str | None, message: str
) -> None:
    if content is not None:
        (folder / "other.yaml").write_text(content)
    assert message in failing(capsys, "train", "--config", "other.yaml")


def test_traceback_is_shown_on_demand(folder: Path) -> None:
    for arguments in (["--traceback", "train"], ["train", "--traceback"]):
        with pytest.raises(FileNotFoundError):
            main([*arguments, "--config", "absent.yaml"])


def test_debug_is_the_old_name_of_traceback_and_an_option_of_transformers(tmp_path: Path) -> None:
    for arguments in (["--debug", "report"], ["report", "--debug"]):
        with pytest.warns(FutureWarning, match="--traceback"), pytest.raises(FileNotFoundError):
            main([*arguments, str(tmp_path / "absent")])
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--debug", "underflow_overflow"]
    assert [option.value for option in train_options(flags)[1].debug] == ["underflow_overflow"]


def test_training_goes_on_from_the_adapter_of_a_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config", "run.yaml", "--max_steps", "1"]) == 0
    further = ["train", "--config", "run.yaml", "--adapter", "out", "--output_dir", "further"]
    assert "the scale of its configuration, 1.25. Found 2" in failing(capsys, *further, "--lora_alpha", "5")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "lora_r"}))
    assert "Leave one out" in failing(capsys, *further, "--lora_r", "0")
    assert main([*further, "--learning_rate", "0", "--max_steps", "1"]) == 0
    first, second = (load_file(folder / run / "pytorch_lora_weights.safetensors") for run in ("out", "further"))
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def test_messages_keep_their_dots_and_paths() -> None:
    try:
        load_rewards(["../runs/a..."])
    except ValueError as error:
        assert "'../runs/a...'" in explain(error)[0] and explain(error)[1] == 2


def test_only_errors_of_this_package_are_shown_without_a_hint() -> None:
    try:
        int("three")
    except ValueError as error:
        message, code = explain(error)
    assert message.startswith("ValueError: invalid literal") and message.endswith("--traceback to see where.")
    assert code == 1


@pytest.mark.parametrize("spelling", ["output-dir", "output_dir"])
def test_options_are_spelled_with_hyphens_or_underscores(
    spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    missing = str(tmp_path / "absent.txt")
    given = ["evaluate", str(tmp_path), "--model", "tiny", "--rewards", "tiny", "--dataset", missing]
    assert "absent.txt" in failing(capsys, *given, f"--{spelling}", str(tmp_path), f"--max{spelling[6]}prompts=2")
    _, config = train_options([f"--{spelling}={tmp_path}", f"--max{spelling[6]}steps", "3", "--use_cpu", "true"])
    assert config.output_dir == str(tmp_path) and config.max_steps == 3


def test_training_from_yaml_and_flags_leaves_a_complete_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config=run.yaml", "--learning-rate", "5e-4", "--seed", "7"]) == 0, capsys.readouterr().err
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "aggregator_state.json", "trainer_state.json", "report.html"} <= names
    config = json.loads((out / "config.json").read_text())
    assert config["learning_rate"] == 5e-4 and config["seed"] == 7 and config["lora_r"] == 4
    assert config["rewards"] == ["cli_rewards:red", "cli_rewards:dark"]
    record = json.loads((out / "environment.json").read_text())
    assert record["command"] == "trl-apex train --config=run.yaml --learning-rate 5e-4 --seed 7"
    assert record["versions"]["trl"] != "not installed"
    assert "# out" in (out / "README.md").read_text()
    for path in out.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


def test_evaluation_fills_report_and_card_of_a_run(folder: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    held_out = ["--eval_dataset", "prompts.txt", "--eval_num_inference_steps", "2"]
    assert main(["train", "--config", "run.yaml", *held_out]) == 0
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_rewards/red/mean" in entry] == [2], "at the end"
    assert "Not evaluated" in (folder / "out" / "README.md").read_text()
    assert main(["evaluate", "out", "--monitors", "jpeg_compressibility"]) == 0  # all else as the run was trained
    assert "jpeg_compressibility (not trained on)" in capsys.readouterr().out
    settings = json.loads((folder / "out" / "results.json").read_text())["settings"]
    assert settings["model"] == str(base) and settings["num_inference_steps"] == 2 and settings["guidance_scale"] == 1
    assert "Did you mean 'out'?" in failing(capsys, "evaluate", "./ou")
    assert "`rewards` must be given" in failing(capsys, "evaluate", "me/adapter", "--model=tiny", "--dataset=tiny")
    card, page = ((folder / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "Not evaluated" not in card and "| red" in card
    assert "Objectives: " in page and "<dt>test prompts</dt><dd>4</dd>" in page and page.count('class="pair"') == 4


def test_a_report_that_fails_loses_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "out" / "report.html").mkdir(parents=True)  # cannot be written over
    assert main(["train", "--config", "run.yaml"]) == 0
    assert (folder / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert "The report of out could not be written" in caplog.text


def test_warnings_of_a_run_are_recorded_once(tmp_path: Path) -> None:
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=7))
    with pytest.warns(UserWarning), recorded_warnings(tmp_path, trainer):
        for _ in range(2):
            warnings.warn_explicit("look at this", UserWarning, "/somewhere/trl_apex/rewards/ocr.py", 1)
        warnings.warn_explicit("of a library", UserWarning, "/somewhere/torch/nn.py", 1)
        logging.getLogger("trl_apex.rewards").warning("and %s", "that")
    lines = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert lines == [{"step": 7, "text": "look at this"}, {"step": 7, "text": "and that"}]


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """A long run in its own process, stopped at its second logged step."""
    command = [sys.executable, "-m", "trl_apex", "train", "--config", "run.yaml", "--max_steps", "2000", *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            break
    return process


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(folder: Path) -> None:
    process = start(folder, "--save_strategy", "no")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert last.startswith("trl-apex train: interrupted; a checkpoint is saved in out.")
    command = last.split("To go on: ")[1]
    assert command.endswith("--save_strategy no --resume_from_checkpoint true")
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    resumed = command.removeprefix("trl-apex ").split()
    resumed[resumed.index("2000")] = str(step + 1)
    assert main(resumed) == 0
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == step + 1
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == sorted(set(steps)), "the log goes on where it was"


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(folder: Path) -> None:
    process = start(folder)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.slow
def test_accelerate_launches_it(folder: Path) -> None:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
    command += ["-m", "trl_apex", "train", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_rewards_take_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    red, constant = load_rewards(["cli_rewards:red", "cli_rewards:Constant(value=2.5, name='two')"])
    assert red.__name__ == "red" and constant.__name__ == "two"
    assert constant(prompts=["a", "b"]) == [2.5, 2.5]
    (jpeg,) = load_rewards(["jpeg_compressibility(quality=50)"])
    assert jpeg.quality == 50  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "spec,message",
    [
        ("ocr(", "must read name"),
        ("ocr(1)", "must read name"),
        ("ocr(workers=__import__('os'))", "must read name"),
        ("ocr(wrong=1)", "must fit"),
        ("deqa", "must fit"),
        ("cli_absent:reward", "must be importable"),
    ],
)
def test_rewards_that_cannot_be(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rewards([spec])


def test_report_and_push_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "Found no directory" in failing(capsys, "report", str(tmp_path / "absent"))
    assert "must hold weights" in failing(capsys, "push", str(tmp_path), "--repo-id", "me/x")


def test_benchmark_says_where_the_scripts_are(capsys: pytest.CaptureFixture) -> None:
    assert "python benchmarks/NAME.py" in failing(capsys, "benchmark")


def test_a_script_leaves_what_the_command_leaves(tmp_path: Path, capsys: pytest.CaptureFixture, caplog) -> None:
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "max_steps": 1, "num_generations": 2, "generation_batch_size": 2,
        "per_device_train_batch_size": 2, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 12,
        "eval_num_inference_steps": 2, "disable_tqdm": True, "updates_per_iteration": 1,
    }  # fmt: skip

    def train(**overrides):
        trainer = APEXTrainer(
            "tiny", "jpeg_compressibility", APEXConfig(**settings | overrides), "tiny", tiny_prompts("test", 2)
        )
        trainer.train()
        trainer.save_model()

    train()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "environment.json", "trainer_state.json", "report.html", "README.md"} <= names
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["eval_rewards/jpeg_compressibility/mean"] < 0
    assert main(["evaluate", str(tmp_path)]) == 0
    assert "2 prompts, 1 image(s) each" in capsys.readouterr().out
    assert "Not evaluated" not in (tmp_path / "README.md").read_text()
    assert main(["report", str(tmp_path)]) == 0
    assert "earlier run" not in caplog.text
    train(seed=1)
    assert "holds checkpoints of an earlier run, up to checkpoint-1" in caplog.text
