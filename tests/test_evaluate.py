"""The evaluate run, on every family of pipelines at toy size."""

import json
import re

import pytest
import torch
from datasets import Dataset
from families import build
from peft import LoraConfig
from PIL import Image

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.diffusion.families import load_policy
from trl_apex.evaluation.run import markdown_table, run_evaluation
from trl_apex.trainers.weights import save_denoiser

PROMPTS = Dataset.from_dict(
    {"prompt": ['a red circle with "CAT"', 'a blue star with "HUT"', "a green star"], "level": [1, 2, 3]}
)
SMALL = {
    "height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 12, "batch_size": 2, "device": "cpu",
    "report": lambda line: None,
}  # fmt: skip


def redness(images, completions, **kwargs):
    return images[:, 0].mean((1, 2)).tolist()


def levelled(prompts, images, level, **kwargs):
    return [None if row == 3 else row + image.std().item() for row, image in zip(level, images, strict=True)]


def blueness(completions, images, **kwargs):
    return images[:, 2].mean((1, 2)).tolist()


def trained(name, output_dir, lora=True, **overrides):
    """A run directory that `save_model` wrote, and the records of its last evaluation."""
    values = {
        "output_dir": str(output_dir), "use_cpu": True, "per_device_train_batch_size": 4, "num_generations": 2,
        "num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "max_sequence_length": 12,
        "max_steps": 2, "learning_rate": 3e-2, "save_strategy": "no", "disable_tqdm": True, "seed": 5,
        "eval_num_inference_steps": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    peft = LoraConfig(r=2, lora_alpha=8, init_lora_weights="gaussian") if lora else None
    trainer = DiffusionGRPOTrainer(
        build(name), [redness, levelled], DiffusionGRPOConfig(**{**values, **overrides}), PROMPTS, PROMPTS,
        peft_config=peft, monitor_funcs=[blueness],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


def as_rows(records):
    return [list(record["rewards"].values()) for record in records]


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux", "sd1.5", "sdxl"])
def test_base_and_adapter_equal_the_trainers_own_evaluation(name, tmp_path):
    trainer = trained(name, tmp_path / "run")
    pipeline = build(name)
    before = [p.clone() for p in load_policy(pipeline).denoiser.parameters()]
    results = run_evaluation(
        pipeline, tmp_path / "run", PROMPTS, [redness, levelled], tmp_path / "out", monitors=blueness,
        guidance_scale=3.0, seed=5, **SMALL,
    )  # fmt: skip
    for reward in ("redness", "levelled", "blueness"):
        own = torch.tensor([record["rewards"][reward] for record in trainer.eval_records])
        tuned = results["models"]["run"][reward]
        assert tuned["mean"] == pytest.approx(own.nanmean().item(), abs=5e-7)
        assert tuned["n"] == int(own.isfinite().sum())
        assert tuned["mean"] != pytest.approx(results["models"]["base"][reward]["mean"], abs=2e-6)
    assert results["models"]["run"]["redness"]["se"] == pytest.approx(
        trainer.state.log_history[-1]["eval_rewards/redness/se"], abs=1e-6
    )
    after = list(load_policy(pipeline).denoiser.parameters())  # the base is whole again
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = run_evaluation(
        build(name), {}, PROMPTS, [redness, levelled], tmp_path / "base", guidance_scale=3.0, seed=5, **SMALL
    )
    assert again["models"]["base"]["redness"] == results["models"]["base"]["redness"]


def test_what_is_written(tmp_path):
    for seed in (1, 2):
        trained("sd3", tmp_path / f"run{seed}", seed=seed)
    both = [tmp_path / "run1", tmp_path / "run2"]
    call = dict(monitors=[blueness], guidance_scale=1.0, images_per_prompt=2, **SMALL)
    results = run_evaluation(build("sd3"), both, PROMPTS, [redness, levelled], tmp_path / "out", **call)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert list(results["models"]) == ["base", "run1", "run2"] and list(results["comparisons"]) == ["run1", "run2"]
    assert results["models"]["base"]["levelled"]["n"] == 2  # prompts, not images; the third has no such reward
    assert Image.open(tmp_path / "out" / "grid.png").size == (3 * 18 - 2, 6 * 18 - 2)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.json", "results.md", "grid.png", "base_grid.png", "run1_grid.png", "run2_grid.png"
    }  # fmt: skip
    table = (tmp_path / "out" / "results.md").read_text()
    assert table == markdown_table(results)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and all(line.count("|") == 7 for line in rows)
    assert rows[4].startswith("| blueness (not trained on) | 0.") and " ± " in rows[2]
    assert re.search(r"run1: every objective .* \(JDR\), .* \(JCR\); hypervolume", table)
    run_evaluation(build("sd3"), both[0], PROMPTS, redness, tmp_path / "one", **{**call, "monitors": []})
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["objectives"].keys() == {"redness"} and (tmp_path / "one/samples/tuned_005.png").is_file()
    from trl_apex.report.run import read_run

    assert len(read_run(tmp_path / "one").samples) == 6


def test_full_weights_and_averages(tmp_path):
    trainer = trained("sd3", tmp_path / "run", ema_decay=0.5)
    call = dict(guidance_scale=3.0, seed=5, **SMALL)
    own = torch.tensor(as_rows(trainer.eval_records))[:, 0].mean().item()  # the trainer evaluates the average
    for ema in (False, True):
        found = run_evaluation(build("sd3"), tmp_path / "run", PROMPTS, redness, tmp_path / "out", ema=ema, **call)
        assert found["models"]["run"]["redness"]["mean"] == pytest.approx(own, abs=1e-6)
    trainer._ema.copy = None
    trainer.save_model()  # a run of 0.1.0 has the last weights in its adapter, the average beside it
    for ema in (False, True):
        found = run_evaluation(build("sd3"), tmp_path / "run", PROMPTS, redness, tmp_path / "out", ema=ema, **call)
        assert (found["models"]["run"]["redness"]["mean"] == pytest.approx(own, abs=1e-6)) is ema
    with pytest.raises(ValueError, match="Found none in me/run. Runs with"):
        run_evaluation(build("sd3"), "me/run", PROMPTS, redness, tmp_path / "out", ema=True, **call)
    other = build("sd3", seed=1)
    save_denoiser(other.transformer, tmp_path / "full" / "transformer")
    pipeline = build("sd3")
    base = pipeline.transformer
    full = run_evaluation(pipeline, tmp_path / "full", PROMPTS, redness, tmp_path / "out", **call)
    assert pipeline.transformer is base
    swapped = build("sd3")
    swapped.transformer = other.transformer
    expected = run_evaluation(swapped, (), PROMPTS, redness, tmp_path / "out", **call)
    assert full["models"]["full"]["redness"]["mean"] == expected["models"]["base"]["redness"]["mean"]
    assert full["models"]["full"] != full["models"]["base"]


def test_mistakes_are_named(tmp_path):
    pipeline = build("sd3")
    (tmp_path / "empty").mkdir()

    def run(adapters, rewards=redness, **kwargs):
        return run_evaluation(pipeline, adapters, PROMPTS, rewards, tmp_path / "out", **{**SMALL, **kwargs})

    with pytest.raises(ValueError, match="must hold pytorch_lora_weights.safetensors, .*Found neither in .*empty"):
        run(tmp_path / "empty")
    with pytest.raises(ValueError, match="Found no folder"):
        run(tmp_path / "none" / "such")
    with pytest.raises(ValueError, match="at least one reward function"):
        run((), [])
    with pytest.raises(ValueError, match="missing a required argument: 'answer'"):
        run((), lambda prompts, answer, **others: [0.0] * len(prompts))
    with pytest.warns(UserWarning, match="named .'redness', 'redness_2'. here"):
        assert list(run((), [redness, redness])["models"]["base"]) == ["redness", "redness_2"]
    with pytest.raises(ValueError, match="No adapter may be called 'base'"):
        run({"base": tmp_path / "empty"})
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        run((), height=18)
