"""The model card of a run."""

import json
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..redact import redacted

FACTS_FILE = "card.json"
TAGS = ["trl", "apex", "grpo", "diffusers", "lora", "text-to-image"]


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the other files of a run do not.

    Args:
        base_model (`str`): hub id or folder of the base pipeline.
        objectives (`list[dict]`): `name`, `weight` and `licence` of each reward.
        tags (`list[str]`): of the repository.
        trainer (`str`): name of the trainer.
        adapter (`bool`): an adapter, or all weights.
        denoiser (`str`): the trained part of the pipeline.
        rule (`str`): how the rewards were combined.
        datasets (`list[str]`): hub ids of the prompts, if any.
        licence (`str`, *optional*): of the weights; the base model's terms apply as well.
        ema_decay (`float`, *optional*): of the average over the training that the weights are.
    """

    base_model: str = ""
    objectives: list[dict[str, Any]] = field(default_factory=list)
    tags: list[str] = field(default_factory=lambda: list(TAGS))
    trainer: str = "APEXTrainer"
    adapter: bool = True
    denoiser: str = "transformer"
    rule: str = "apex"
    datasets: list[str] = field(default_factory=list)
    licence: str | None = None
    ema_decay: float | None = None


def write_model_card(run_dir: str | Path, facts: CardFacts, repo_id: str | None = None) -> Path:
    """Write `README.md` from the facts and what else lies in the run directory, and keep the facts for later.

    Args:
        run_dir (`str` or `Path`): the run directory.
        facts ([`CardFacts`]): see there.
        repo_id (`str`, *optional*): where it will be; the folder's name by default.

    Returns:
        `Path`: the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run_dir = Path(run_dir)
    (run_dir / FACTS_FILE).write_text(json.dumps(redacted(asdict(facts)), indent=1))
    hub_model = facts.base_model if _is_hub_id(facts.base_model) else None
    samples = _samples(run_dir)
    data = ModelCardData(
        base_model=hub_model,
        library_name="diffusers",
        license=facts.licence,
        pipeline_tag="text-to-image",
        tags=[tag for tag in facts.tags if facts.adapter or tag != "lora"],
        datasets=facts.datasets or None,
        widget=[{"text": s["prompt"], "output": {"url": s["image"]}} for s in samples[:6]] or None,
    )
    text = _render(run_dir, facts, repo_id or run_dir.resolve().name, hub_model)
    path = run_dir / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def refresh_model_card(run_dir: str | Path, repo_id: str | None = None) -> Path:
    """Write the card anew, with the facts kept from the last time, or with what the run directory tells.

    Args:
        run_dir (`str` or `Path`): the run directory.
        repo_id (`str`, *optional*): where it will be.
    """
    run_dir = Path(run_dir)
    kept = _read(run_dir / FACTS_FILE)
    if not kept:
        config, adapter = _read(run_dir / "config.json"), _read(run_dir / "adapter_config.json")
        names = list(_read(run_dir / "summary.json").get("objectives", {}))
        kept = {
            "base_model": str(config.get("model") or adapter.get("base_model_name_or_path") or ""),
            "objectives": [{"name": name, "weight": None, "licence": ""} for name in names],
            "adapter": bool(adapter),
            "rule": config.get("multi_objective_aggregation", "apex"),
        }
    known = {name: kept[name] for name in CardFacts.__dataclass_fields__ if name in kept}
    return write_model_card(run_dir, CardFacts(**known), repo_id)


def _render(run_dir: Path, facts: CardFacts, repo_id: str, hub_model: str | None) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    environment.filters["figure"] = _figure
    template = environment.from_string((files(__package__) / "model_card.md.jinja").read_text(encoding="utf-8"))
    summary, environment_file = _read(run_dir / "summary.json"), _read(run_dir / "environment.json")
    return template.render(
        facts=facts,
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        hub_model=hub_model,
        base_name=hub_model or Path(facts.base_model).name or "its base model",
        results=[
            {"name": name, "trained": part == "objectives", **row}
            for part in ("objectives", "held_out")
            for name, row in (summary.get(part) or {}).items()
        ],
        figures={"samples": "", "rewards": "", "priorities": ""} | _figures(run_dir),
        config=redacted(_changed(_read(run_dir / "config.json"))),
        command=redacted(environment_file.get("command", "")),
        versions=environment_file.get("versions", {}),
        steps=_read(run_dir / "trainer_state.json").get("global_step"),
        report=(run_dir / "report.html").is_file(),
        state=(run_dir / "aggregator_state.json").is_file(),
        prompt=json.dumps(
            next((s["prompt"] for s in _samples(run_dir)), "a red circle on a table"), ensure_ascii=False
        ),
    )


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments, without the empty ones."""
    return {key: value for key, value in config.items() if value not in (None, "", [], {})}


def _figures(run_dir: Path) -> dict[str, str]:
    return {path.stem: f"figures/{path.name}" for path in (run_dir / "figures").glob("*.png")}


def _samples(run_dir: Path) -> list[dict[str, str]]:
    images = sorted((run_dir / "samples").glob("tuned_*.png"), key=lambda path: (len(path.stem), path.stem))
    try:
        prompts = json.loads((run_dir / "samples" / "prompts.json").read_text(encoding="utf-8"))
        return [
            {"prompt": str(prompts[int(path.stem.rpartition("_")[2])]["prompt"]), "image": f"samples/{path.name}"}
            for path in images
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not Path(name).exists()


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    return (
        " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    )


def _figure(value: Any, sign: bool = False) -> str:
    """A number for the table of results."""
    if not isinstance(value, int | float) or value != value:
        return ""
    return f"{value:{'+' if sign else ''}.3f}".replace("-", "\N{MINUS SIGN}")
