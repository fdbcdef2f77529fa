"""What a run shows while it runs: numbers with a definition, pictures with their rewards, a line on the terminal."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_rewards import contrast, redness
from transformers import ProgressCallback as TqdmCallback

from trl_apex import APEXTrainer
from trl_apex.report.figures import reward_grid
from trl_apex.trainers.callbacks import ProgressCallback

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"


def documented() -> list[re.Pattern]:
    """A pattern for every key in the tables of "Every metric"; `{name}` stands for an objective's name."""
    tables = DOCS.read_text().partition("## Every metric")[2]
    keys = [
        key
        for line in tables.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    return [re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(key))) for key in keys]


@pytest.fixture
def run(pipeline, dataset, lora, make_args):
    """A real run with everything on that logs; its trainer."""

    def train(**overrides):
        values = {
            "max_steps": 4, "beta": 0.1, "gradient_probe": True, "eval_strategy": "steps", "eval_steps": 2,
            "eval_num_inference_steps": 2, "log_completions": True, "num_completions_to_print": 0,
        }  # fmt: skip
        trainer = APEXTrainer(
            pipeline, [redness, contrast], make_args(**{**values, **overrides}), dataset, dataset.select(range(3)),
            peft_config=lora, monitor_funcs=[brightness],
        )  # fmt: skip
        trainer.train()
        return trainer

    return train


def brightness(images, **kwargs):
    return images.mean((1, 2, 3)).tolist()


def test_every_key_that_is_logged_is_defined_in_the_docs(run):
    patterns = documented()
    assert len(patterns) > 35
    logged = {key for entry in run(report_to="none").state.log_history for key in entry}
    assert len(logged) > 45
    missing = sorted(key for key in logged if not any(pattern.fullmatch(key) for pattern in patterns))
    assert not missing, f"docs/trainer.md does not define {missing}"


def test_pictures_with_their_rewards_reach_tensorboard(run):
    trainer = run(report_to="tensorboard")
    (folder,) = Path(trainer.args.output_dir, "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert "train/priority/redness" in events.Tags()["scalars"]
    rollouts, evaluations = events.Images("images/rollout"), events.Images("images/eval")
    assert [event.step for event in rollouts] == [1, 3]  # once an iteration of two updates
    assert [event.step for event in evaluations] == [2, 4]
    seen = np.asarray(Image.open(io.BytesIO(evaluations[-1].encoded_image_string)).convert("RGB"))
    assert np.array_equal(seen, np.asarray(reward_grid(trainer.eval_records, 8)))
    assert set(trainer.eval_records[0]["rewards"]) == {"redness", "contrast", "brightness"}
    logs = trainer._logs
    newest = [
        {"prompt": logs["prompt"][i], "image": logs["images"][i][0], "rewards": {k: v[i] for k, v in logs["rewards"].items()}}
        for i in range(8)
    ]  # fmt: skip
    seen = np.asarray(Image.open(io.BytesIO(rollouts[-1].encoded_image_string)).convert("RGB"))
    assert np.array_equal(seen, np.asarray(reward_grid(newest, 4)))


def test_pictures_reach_wandb(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not a dependency of the tests")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    run(report_to="wandb", run_name="run")
    for name in ("rollout", "eval"):
        assert len(list(tmp_path.rglob(f"media/images/images/{name}_*.png"))) == 2


def test_pictures_reach_trackio(run):
    trackio = pytest.importorskip("trackio", reason="trackio is not a dependency of the tests")
    media = trackio.utils.MEDIA_DIR
    before = set(media.rglob("*.png"))
    trainer = run(report_to="trackio", run_name="trl_apex_test")
    new = set(media.rglob("*.png")) - before
    sizes = [Image.open(path).size for path in new]
    for path in new:
        path.unlink()
    assert sizes.count(reward_grid(trainer.eval_records, 8).size) == 2


def test_captions_and_the_order_of_a_grid():
    sample = {"prompt": "ein Kätzchen, 猫", "image": Image.new("RGB", (4, 2), "red"), "rewards": {"a": None, "b": 0.5}}
    other = {**sample, "image": Image.new("RGB", (4, 2), "blue")}
    grid = np.asarray(reward_grid([sample, sample, other], columns=2, side=80))
    height = 40 + 3 * 12
    assert grid.shape == (2 * height + 2, 2 * 80 + 2, 3)
    assert (grid[:40, :80] == [255, 0, 0]).all() and (grid[height + 2 : height + 42, :80] == [0, 0, 255]).all()
    assert (grid[40:height, :80] < 128).any(), "there is a caption"
    assert (grid[height + 2 :, 82:] == 255).all(), "the fourth cell is empty"


def test_the_terminal_shows_rewards_and_priorities(pipeline, dataset, lora, make_args):
    screen = io.StringIO()
    progress = ProgressCallback(["redness", "contrast"], Console(file=screen, force_terminal=True, width=200))
    trainer = APEXTrainer(
        pipeline, [redness, contrast], make_args(max_steps=2), dataset, peft_config=lora, callbacks=[progress]
    )
    trainer.train()
    reward = next(entry["rewards/contrast/mean"] for entry in trainer.state.log_history if "loss" in entry)
    assert f"contrast {reward:.3g} (50%)" in screen.getvalue() and "2/2" in screen.getvalue()


def test_off_a_terminal_each_log_is_one_line(pipeline, dataset, lora, make_args, capsys):
    args = make_args(max_steps=2, logging_steps=1, disable_tqdm=False)
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora)
    assert TqdmCallback not in [type(callback) for callback in trainer.callback_handler.callbacks]
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "redness" in line]  # of the one iteration
    assert line.startswith("update 1/2:") and "contrast" in line and "%" in line
