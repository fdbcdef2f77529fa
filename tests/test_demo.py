"""The demo, shortened: everything it promises is there."""

import json

from PIL import Image
from rich.console import Console

from trl_apex.demo import HELD_OUT, run_demo, table


def test_demo_trains_evaluates_reloads_and_reports(tmp_path):
    output = tmp_path / "demo"
    console = Console(record=True, width=140)
    overrides = {"max_steps": 4, "per_device_train_batch_size": 16, "generation_batch_size": 16, "save_steps": 2}
    summary = run_demo(output, seed=1, test_prompts=12, console=console, **overrides)
    written = json.loads((output / "summary.json").read_text())
    assert list(written["objectives"]) == ["ocr", "pickscore", "deqa", "aesthetic"]
    assert set(written["held_out"]) == set(HELD_OUT)
    for row in [*written["objectives"].values(), *written["held_out"].values()]:
        assert {"base", "tuned", "se", "gain"} <= set(row) and row["n"] == 12
    assert written["seconds"]["total"] > written["seconds"]["train"] > 0
    assert summary["objectives"]["ocr"]["base"] == written["objectives"]["ocr"]["base"]
    for name in ("pytorch_lora_weights.safetensors", "aggregator_state.json", "trainer_state.json", "config.json"):
        assert (output / name).is_file(), name
    page = (output / "report.html").read_text()
    assert "Objectives: " in page and page.count('class="pair"') == 12 and ">exact_<wbr>word<" in page
    assert "<dt>test prompts</dt><dd>12</dd>" in page and "<dt>base model</dt><dd>tiny</dd>" in page
    card = (output / "README.md").read_text()
    assert "Not evaluated" not in card and "| exact_word" in card and "figures/rewards.png" in card
    assert "max_steps" in json.loads((output / "environment.json").read_text())["changed"]
    assert Image.open(output / "tuned_grid.png").size == Image.open(output / "base_grid.png").size
    prompts = json.loads((output / "samples" / "prompts.json").read_text())
    assert len(prompts) == 12 and prompts[0]["tuned"]["ocr"] is not None
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("priority/ocr" in entry and "rewards/deqa/mean" in entry for entry in log)
    assert any("eval_rewards/exact_word/mean" in entry for entry in log)
    assert "Held-out prompts" in console.export_text()


def test_a_metric_without_spread_has_no_gain_and_is_shown():
    row = {"base": 1.0, "tuned": 1.0, "se": 0.0, "gain": None, "gain_se": None}
    console = Console(record=True, width=140)
    console.print(table({"objectives": {}, "held_out": {"attributes": row}}))
    assert "1.000" in console.export_text()
