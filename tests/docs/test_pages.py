"""What the documentation promises about itself: every metric, every old field, every path."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml

from tools import options_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Of trl 0.23.1, the last release that had it.
_DDPO_CONFIG = """
exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale
sample_batch_size sample_num_batches_per_epoch train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1
train_adam_beta2 train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm
train_num_inner_epochs train_cfg train_adv_clip_max train_clip_range train_timestep_fraction per_prompt_stat_tracking
per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count async_reward_computation max_workers
negative_prompts push_to_hub
"""
DDPO_FIELDS = _DDPO_CONFIG.split()


def documented_metrics() -> set[str]:
    return set(re.findall(r"`([a-z_]+(?:/[a-z_{}]+)*)`", (DOCS / "trainer.md").read_text()))


def logged_metrics(tmp_path, pairs: str) -> set[str]:
    """The keys of a real run, with the objectives' names put back to {name}, {a} and {b}."""
    from datasets import Dataset
    from peft import LoraConfig

    from trl_apex import APEXConfig, APEXTrainer
    from trl_apex.tiny.pipeline import build_pipeline

    def red(images, **kwargs):
        return images[:, 0].mean((1, 2)).tolist()

    def dark(images, **kwargs):
        return [None, *(-images.mean((1, 2, 3))).tolist()[1:]]

    args = APEXConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        num_generations=2,
        generation_batch_size=4,
        per_device_train_batch_size=4,
        num_inference_steps=3,
        eval_num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=12,
        gradient_accumulation_steps=1,
        beta=0.01,
        gradient_probe=True,
        probe_every=1,
        logging_steps=1,
        save_strategy="no",
    )
    prompts = Dataset.from_dict({"prompt": ["a red circle", "a blue star"]})
    trainer = APEXTrainer(
        build_pipeline(0), [red, dark], args, prompts, eval_dataset=prompts, peft_config=LoraConfig(r=2, lora_alpha=2)
    )
    trainer.train()
    trainer.evaluate()
    keys = {key for row in trainer.state.log_history for key in row}
    keys = {key.replace("red/dark", pairs) for key in keys}
    return {re.sub(r"(?<=/)(red|dark)(?=/|$)", "{name}", key) for key in keys}


def test_every_logged_metric_is_defined_on_the_trainers_page(tmp_path):
    trainers_own = {
        "step",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "train_loss",
    }
    logged = logged_metrics(tmp_path, "{a}/{b}") - trainers_own
    assert {"priority/{name}", "conflict/{a}/{b}", "kl", "gradient_harmony", "eval_reward"} <= logged
    assert not logged - documented_metrics(), (
        f"docs/trainer.md does not define {sorted(logged - documented_metrics())}"
    )


@pytest.mark.parametrize("field", DDPO_FIELDS)
def test_every_field_of_ddpo_has_a_row(field):
    rows = [line for line in (DOCS / "migration.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`{field}`" in row.split("|")[1] for row in rows), field


def test_the_right_side_of_the_ddpo_table_exists():
    from trl_apex import APEXConfig

    fields = set(APEXConfig.__dataclass_fields__)
    section = (
        (DOCS / "migration.md").read_text().split("### Every field of `DDPOConfig`")[1].split("## From flow_grpo")[0]
    )
    other = {"accelerate launch", "WANDB_PROJECT", "APEXConfig", "completions"}
    for row in [line for line in section.splitlines() if line.startswith("| `")]:
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", row.split("|")[2]):
            assert name in fields | other, f"{name} is no field of APEXConfig: {row}"


def test_the_table_of_other_defaults_is_complete():
    from dataclasses import MISSING, fields

    from trl import GRPOConfig

    from trl_apex import APEXConfig

    trl_defaults = {field.name: field.default for field in fields(GRPOConfig)}
    differ = {
        field.name
        for field in fields(APEXConfig)
        if trl_defaults.get(field.name, MISSING) not in (MISSING, field.default)
    }
    section = (DOCS / "trainer.md").read_text().split("## Defaults that differ from TRL's")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == differ


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"]


def test_paths_that_pages_mention_exist():
    mention = re.compile(r"\b(?:examples|trl_apex|tests|docs|benchmarks)/[\w./-]*\w\.(?:py|yaml|md|ipynb|json)\b")
    for page in pages():
        for path in mention.findall(page.read_text()):
            if "your" not in path:
                assert (ROOT / path).exists(), f"{page.name} mentions {path}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_modules_that_a_page_mentions_exist(page):
    for name in set(re.findall(r"\btrl_apex(?:\.\w+)+", page.read_text())):
        pkgutil.resolve_name(name)  # an old import path warns, and warnings are errors


def nav_files(entries) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [file for entry in values for file in nav_files(entry)]


def test_the_navigation_and_the_pages_agree():
    nav = set(nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert nav == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_every_equation_is_called_a_reconstruction():
    for page in pages():
        text = " ".join(page.read_text().lower().split())
        assert not re.search(r"(?<!not )the paper's equation", text), page.name
    for name in ("index.md", "papers.md", "comparison.md"):
        assert "reconstructed from" in (DOCS / name).read_text(), name


def test_error_messages_on_the_troubleshooting_page_are_raised_somewhere():
    joined = "".join(path.read_text() for path in sorted((ROOT / "trl_apex").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", joined)
    table = (DOCS / "troubleshooting.md").read_text().split("## Error messages")[1]
    messages = re.findall(r'^\| "([^"]+)" \|', table, re.MULTILINE)
    assert len(messages) >= 6
    for message in messages:
        start = " ".join(message.split()[:6])
        assert start in joined, message


def test_commands_that_pages_mention_exist():
    from trl_apex.cli import COMMANDS

    for page in pages():
        for command in re.findall(r"trl-apex ([a-z][a-z-]*)", page.read_text()):
            assert command in COMMANDS, f"{page.name}: trl-apex {command}"


def test_the_page_of_all_options_is_current():
    assert options_page.PAGE.read_text() == options_page.page(), "run: python -m tools.options_page"
