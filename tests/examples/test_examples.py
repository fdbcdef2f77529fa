"""Each example runs, at toy size, through its own flags."""

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from trl import TrlParser

from trl_apex.cli import train_options
from trl_apex.tiny.pipeline import build_pipeline

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
PROCESSES = {"sd35_lora_8gpu": 8, "sd35_full_zero2": 8}


@pytest.fixture(autouse=True)
def folder_of_the_script(monkeypatch):
    """`python examples/x.py` puts the script's folder on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def column(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def test_every_script_is_tested_here():
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'"{script.stem}"' in tested, f"{script.name} has no test"


def test_the_server_under_ray_has_its_rewards():
    pytest.importorskip("ray", reason="needs Ray")
    assert list(load("ray_serve").app().state.rewards) == ["jpeg_compressibility"]


def test_the_aggregator_alone():
    priorities = load("aggregator_alone").main(iterations=30)
    assert sum(priorities.values()) == pytest.approx(1)
    assert priorities["quiet"] < 1 / 3, "the objective that rises by itself needs no help"


def test_the_plain_loop_trains():
    loop = load("plain_loop").main(["--iterations", "2", "--groups", "2", "--group", "2"])
    assert loop.scores.shape == (4, 4) and loop.scores.isfinite().all()
    assert loop.advantages.abs().max() > 0
    assert any(parameter.abs().max() > 0 for name, parameter in loop.model.named_parameters() if "lora_B" in name)


def test_the_plain_loops_first_ratio_is_one():
    module = load("plain_loop")
    ratios = []

    class Watched(module.PlainLoop):
        def update(self, text):
            with torch.no_grad():
                for image, position in self.micro_batches():
                    x, after = self.latents[image, position], self.latents[image, position + 1]
                    velocity = self.velocity(x, position, (text[0][image], text[1][image]))
                    log_prob = self.log_prob(after, *self.transition(x, velocity, position))
                    ratios.append(torch.exp(log_prob - self.log_probs[image, position]))

    work = module.Work(groups=1, group=4, batch=2, side=32, steps=4, guidance=1.5, rank=4)
    rewards = [lambda prompts, completions: [float(picture.getpixel((0, 0))[0]) for picture in completions]]
    loop = Watched(build_pipeline(0), rewards, ["a red circle"], work, lambda scores, groups: (scores[:, 0], {}))
    loop.iteration(0)
    assert (torch.cat(ratios) - 1).abs().max() < 1e-5


def test_a_language_model_keeps_both_rewards_up(tmp_path):
    trainer = load("language_model").main(
        ["--output_dir", str(tmp_path), "--disable_tqdm", "true", "--max_steps", "25", "--logging_steps", "1"]
    )
    for name in ("loud_sun", "quiet_moon"):
        means = column(trainer, f"rewards/{name}/mean")
        assert sum(means[-8:]) > 1.1 * sum(means[:8]), name
    assert (tmp_path / "aggregator_state.json").is_file()


def test_the_language_models_size_is_as_its_docstring_says():
    module = load("language_model")
    model, _ = module.tiny_model()
    assert f"{round(sum(p.numel() for p in model.parameters()) / 1000)} thousand" in module.tiny_model.__doc__


def test_custom_rewards(tmp_path):
    trainer = load("custom_reward").main(["--max_steps", "1", "--output_dir", str(tmp_path)])
    assert trainer.reward_func_names == ["right_colour", "calm", "balance"]
    assert trainer.aggregator.iteration > 0
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_mixed_prompts(tmp_path):
    trainer = load("mixed_prompts").main(["--max_steps", "3", "--output_dir", str(tmp_path)])
    for name, prompts in {"ocr": 2, "right_colour": 2, "pickscore": 4, "aesthetic": 4}.items():
        assert column(trainer, f"rewards/{name}/prompts") == [prompts], name
        assert column(trainer, f"rewards/{name}/images") == [8 * prompts], name
    assert column(trainer, "missing/ocr") == [0.5]


def test_edits_with_two_rewards_that_conflict(tmp_path, capsys):
    trainer = load("edit_images").main(["--paint_steps", "1", "--max_steps", "1", "--output_dir", str(tmp_path)])
    (row,) = [row for row in trainer.state.log_history if "rewards/source/mean" in row]
    assert 0 < row["rewards/source/mean"] < 1 and row["rewards/recoloured/images"] == 64
    assert "priority" in capsys.readouterr().out


def test_remote_rewards_in_one_process(tmp_path):
    trainer = load("remote_rewards").main(["both", "--max_steps", "1", "--output_dir", str(tmp_path)])
    (row,) = [row for row in trainer.state.log_history if "rewards/contrast/mean" in row]
    assert row["rewards/contrast/mean"] > 0 and row["rewards/jpeg_compressibility/mean"] < 0
    assert row["reward_failures/contrast"] == row["reward_failures/jpeg_compressibility"] == 0


@pytest.mark.slow
def test_remote_rewards_in_two_processes(tmp_path):
    command = [sys.executable, str(EXAMPLES / "remote_rewards.py")]
    with reserved_port() as port:
        server = subprocess.Popen([*command, "serve", "--port", str(port)], stdout=subprocess.PIPE, text=True)
        try:
            assert "Serving" in server.stdout.readline()
            url = f"http://127.0.0.1:{port}"
            train = [*command, "train", "--url", url, "--max_steps", "1", "--output_dir", str(tmp_path)]
            done = subprocess.run(train, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
        finally:
            server.terminate()
            server.wait(20)


@pytest.mark.parametrize("flags, owner", [(["--static"], "DiffusionGRPOTrainer"), ([], "APEXTrainer")])
def test_switching_by_one_import(tmp_path, flags, owner):
    trainer = load("switch_to_apex").main([*flags, "--max_steps", "1", "--output_dir", str(tmp_path)])
    assert type(trainer).__name__ == owner
    assert math.isfinite(column(trainer, "loss")[0])


def test_sd35_lora_at_toy_size(tmp_path):
    prompts = tmp_path / "held_out.txt"
    prompts.write_text('a red circle\na blue square with " H U T "\n')
    flags = [
        "--eval_dataset",
        str(prompts),
        "--monitors",
        "jpeg_compressibility",
        "jpeg_incompressibility(quality=50)",
    ]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--eval_num_inference_steps", "3"]
    trainer = load("train_sd35_apex").main(
        [
            "--config",
            str(EXAMPLES / "configs/sd35_tiny.yaml"),
            "--output_dir",
            str(tmp_path),
            "--max_steps",
            "2",
            *flags,
        ]
    )
    assert column(trainer, "eval_rewards/jpeg_compressibility/mean")
    assert trainer.reward_func_names == ["ocr", "pickscore", "deqa", "aesthetic"]
    assert column(trainer, "ratio/max_deviation")[0] < 1e-6  # rollout and update use batches of different sizes
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((tmp_path / "aggregator_state.json").read_text())["iteration"] == 1


def test_sd35_full_at_toy_size(tmp_path):
    trainer = load("train_sd35_full").main(
        ["--config", str(EXAMPLES / "configs/sd35_full_tiny.yaml"), "--output_dir", str(tmp_path)]
    )
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert math.isfinite(column(trainer, "loss")[-1])


@pytest.mark.slow
def test_the_tiny_world(tmp_path):
    trainer = load("train_tiny_world").main(["--max_steps", "4", "--output_dir", str(tmp_path), "--num_prompts", "16"])
    assert set(trainer.aggregator.priorities) == {"ocr", "pickscore", "deqa", "aesthetic"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_accepted_and_its_arithmetic_adds_up(path, tmp_path):
    script = load("train_sd35_apex")
    parser = TrlParser((script.ScriptArguments, script.APEXConfig))
    changes = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--report_to", "none"]
    _, args = parser.parse_args_and_config(["--config", str(path), *changes])
    values = yaml.safe_load(path.read_text())
    processes = PROCESSES.get(path.stem, 1)
    per_device = args.generation_batch_size // processes
    assert args.generation_batch_size % args.num_generations == 0
    assert args.generation_batch_size % (args.per_device_train_batch_size * processes) == 0
    rows = per_device * (args.timesteps_per_image or args.sde_window_size or args.num_inference_steps - 1)
    update = args.per_device_train_batch_size * args.timestep_batch_size * args.gradient_accumulation_steps
    assert rows % update == 0 and rows // update in (1, 2)
    assert not args.rollout_batch_size or per_device % args.rollout_batch_size == 0
    ours = set(vars(args)) | set(script.ScriptArguments.__dataclass_fields__)
    assert set(values) <= ours
    train_options(["--config", str(path), *changes])  # `trl-apex train` and `trl-apex plan` take the file as well


GPU_RECIPES = [path for path in CONFIGS if "tiny" not in path.stem]


@pytest.mark.parametrize("path", GPU_RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_is_explained(path):
    plain = {"model", "output_dir", "width", "eval_strategy", "seed", "rewards"}  # the name says it
    for line in path.read_text().splitlines():
        key = line.partition(":")[0]
        if line and not line.startswith((" ", "#")) and key not in plain:
            assert "#" in line, f"{path.name}: {key}"


def test_the_notebook_runs_and_shows_what_it_says(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((EXAMPLES / "variance_hijacking.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are stripped"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    shares, paths, hard = names["shares"], names["paths"], names["hard"]
    assert shares["sum_then_normalize"][0] > 0.99
    assert all(0.35 < share < 0.65 for share in shares["apex"])
    assert abs(paths["sum_then_normalize"][-1, 1]) < 0.3 and paths["apex"][-1].min() > 1
    assert hard["apex"][0][1] > 1.2 * hard["normalize_then_sum"][0][1]
    assert hard["apex"][1]["up"] > 0.6
