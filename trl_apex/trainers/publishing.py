"""A run on the Hugging Face Hub: its model card and its upload.

Trainer would upload `training_args.bin` with the token in it, leave out the adapter that diffusers loads, and lose errors of
uploads in between. Here an upload is one commit of what `UPLOADED` names.
"""

import fnmatch
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, ModelCard, ModelCardData, errors
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..redact import redacted
from ..report import write_report
from .weights import save_denoiser

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Not training_args.bin (a pickle of the arguments), completions/ and logs.
UPLOADED = [
    *("README.md", "report.html", "pytorch_lora_weights.safetensors"),
    *("adapter_model.safetensors", "adapter_config.json", "transformer/*", "unet/*"),
    *("aggregator_state.json", "population_conflict.json", "trainer_state.json"),
    *("summary.json", "config.json", "environment.json", "figures/*.png", "samples/*.png", "samples/prompts.json"),
]
PAUSES = (1.0, 4.0)
"""Seconds before each further attempt after a network failure."""
SENT_ONCE = ("/repos/create", "/validate-yaml", "/commit/")
"""Requests that the client of the Hub sends once. It repeats the others of an upload by itself."""
FACTS_FILE = "card.json"


# While a run goes on


def card_facts(trainer: Any, dataset_name: str | None, tags: list[str], licence: str | None) -> "CardFacts":
    """What the card of a trainer's run says."""
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), trainer.reward_funcs, strict=True)
    return CardFacts(
        base_model=str(trainer.sources.model or ""),
        objectives=[
            {"name": name, "weight": weight, "licence": getattr(reward, "weights_licence", None)}
            for name, weight, reward in rewards
        ],
        tags=[
            "image-to-image" if trainer.policy.edits and tag == "text-to-image" else tag
            for tag in dict.fromkeys([*trainer._tag_names, "lora", *tags])
        ],
        trainer=type(trainer).__name__,
        adapter=isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel),
        denoiser=trainer.policy.denoiser_name,
        rule=trainer.args.multi_objective_aggregation,
        datasets=[dataset_name] if dataset_name else [],
        licence=licence,
        ema_decay=trainer.args.ema_decay,
    )


def write_run_report(run_dir: str | Path) -> None:
    """Write the report; one that fails is a warning, since the run is saved by then."""
    try:
        write_report([run_dir])
    except Exception as error:
        logger.warning("The report of %s could not be written: %s: %s", run_dir, type(error).__name__, error)


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Upload a checkpoint in the background, by `hub_strategy`; a failure is a warning."""
    args, strategy = trainer.args, trainer.args.hub_strategy
    if strategy == HubStrategy.END or not trainer.is_world_process_zero():
        return
    busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if busy and not args.hub_always_push:
        return
    trainer.create_model_card()
    # The folder is laid out as the repository, out of links that outlive the checkpoint.
    staged = Path(tempfile.mkdtemp(prefix=".push-", dir=args.output_dir))
    left_out = {"README.md", *(("adapter_model.safetensors",) if args.ema_decay else ())}  # not averaged
    for path in checkpoint.iterdir():
        if is_uploaded(path.name) and path.name not in left_out:
            _link(path, staged / path.name)
    shutil.copy(Path(args.output_dir) / "README.md", staged)
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(str(strategy.value))
    if folder:
        shutil.copytree(checkpoint, staged / folder, copy_function=_link)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if not isinstance(model, PeftModel) and trainer._engine == "ddp":
        with trainer._ema.applied():
            save_denoiser(model, staged / trainer.policy.denoiser_name)
    api, repo_id = HfApi(token=trainer._hub_token), trainer.hub_model_id
    options: Any = {"commit_message": f"Training in progress, {checkpoint.name}", "revision": args.hub_revision}

    def upload() -> None:
        try:
            trying(lambda: api.upload_folder(repo_id=repo_id, folder_path=staged, **options), repo_id, api.endpoint)
        except PushError as error:
            logger.warning("%s The run goes on, and the next upload holds everything.", error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    job = api.run_as_future(upload)
    if busy:
        trainer.push_in_progress.jobs.append(job)
    else:
        trainer.push_in_progress = PushInProgress([job])


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file to another place, or copy it where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# Uploading a run directory


class PushError(RuntimeError):
    """An upload failed; the run on disk is unchanged. `user` says whether the user can mend it (token, name, permission)."""

    def __init__(self, message: str, user: bool = False) -> None:
        super().__init__(message)
        self.user = user
        self.exit_code = 2 if user else 1  # of a command that fails with it


def is_uploaded(path: str) -> bool:
    """Whether a file goes up, by its path in the run directory.

    Example:
        >>> is_uploaded("samples/base_0.png"), is_uploaded("training_args.bin"), is_uploaded("checkpoint-4/README.md")
        (True, False, False)
    """
    return any(fnmatch.fnmatch(path, pattern) for pattern in UPLOADED)


def check_uploadable(run_dir: str | Path) -> None:
    """Raise FileNotFoundError for a directory that does not exist or holds no weights to upload."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {run_dir}. Pass the `output_dir` of a training run."
        )
    if not any(is_uploaded(path.relative_to(run_dir).as_posix()) for path in run_dir.rglob("*.safetensors")):
        raise FileNotFoundError(
            f"A run to upload must hold weights. Found no pytorch_lora_weights.safetensors and no transformer/ in {run_dir}. "
            "Pass the `output_dir` of a finished run; `trainer.save_model()` writes them."
        )


def push_run(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create: bool = True,
    commit_message: str = "Upload run",
    endpoint: str | None = None,
) -> str:
    """Upload a run in one commit, all of it or nothing, and return the address of the repository.

    Args:
        run_dir (`str` or `Path`): the run directory, with its model card.
        repo_id (`str`): `user/name`, or a name in your own space.
        token (`str`, *optional*): by default that of `hf auth login` or HF_TOKEN.
        private (`bool`, *optional*): visibility of a repository that is created.
        revision (`str`, *optional*): branch to commit to.

    Raises:
        FileNotFoundError: if there is no such run, or it holds no weights.
        PushError: if the upload fails; the run directory is as before.
    """
    check_uploadable(run_dir)
    api = HfApi(endpoint=endpoint, token=token)

    def upload() -> str:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id if create else repo_id
        options: Any = {"commit_message": commit_message, "revision": revision, "allow_patterns": UPLOADED}
        return str(api.upload_folder(repo_id=name, folder_path=run_dir, **options).repo_url)

    return trying(upload, repo_id, api.endpoint, run_dir)


def trying(attempt: Callable[[], T], repo_id: str, endpoint: str, run_dir: str | Path | None = None) -> T:
    """Call something that talks to the Hub; call it again after a network failure that the Hub's client does not repeat."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except Exception as error:
            if pause is None or not (is_network_failure(error) and _sent_once(error)):
                cause, user = _cause(error, repo_id, endpoint)
                again = f" Nothing is lost: the run is in {run_dir}. To try again: trl-apex push {run_dir} --repo-id {repo_id}"
                raise PushError(f"Could not upload to {repo_id}: {cause}.{again if run_dir else ''}", user) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def is_network_failure(error: BaseException) -> bool:
    """Whether another attempt may help: the server is busy or broken, or gave no answer."""
    status = _status(error)
    network = isinstance(error, errors.HTTPError | ConnectionError | TimeoutError)
    return network and (status is None or status >= 500 or status == 429)


def _sent_once(error: BaseException) -> bool:
    if not isinstance(error, errors.HTTPError):
        return False
    request = error.response.request if isinstance(error, errors.HfHubHTTPError) else error.request
    return any(part in str(request.url) for part in SENT_ONCE)


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


def _cause(error: BaseException, repo_id: str, endpoint: str) -> tuple[str, bool]:
    """What went wrong and what to do, and whether the user can mend it."""
    status, no_token = _status(error), isinstance(error, errors.LocalTokenNotFoundError)
    if isinstance(error, errors.HfHubHTTPError) and status == 401:
        no_token = "authorization" not in error.response.request.headers and "nvalid" not in str(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        cause = "offline mode is on. Unset HF_HUB_OFFLINE"
    elif isinstance(error, errors.HFValidationError):
        cause = f"{repo_id!r} is no name of a repository. Use `user/name`"
    elif no_token:
        cause = f"{endpoint} wants a token and there is none. Run `hf auth login`, or set HF_TOKEN"
    elif status == 404 or isinstance(error, errors.RepositoryNotFoundError):  # a private one looks absent to strangers
        cause = f"there is no repository {repo_id} at {endpoint}, or the token does not see it. Check name and token"
    elif status == 401:
        cause = f"{endpoint} does not accept the token. Make a new one with write access, and run `hf auth login`"
    elif status == 403:
        cause = f"the token may not write to {repo_id}. Use one with write access to it, or another --repo-id"
    elif is_network_failure(error):
        return f"the connection to {endpoint} failed ({type(error).__name__}). Check it, or wait", False
    else:
        return f"{type(error).__name__}: {str(redacted(str(error))).partition(chr(10))[0].rstrip('.')}", False
    return cause, True


# The model card


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the other files of a run do not."""

    base_model: str = ""  # hub id or folder of the base pipeline
    objectives: list[dict[str, Any]] = field(default_factory=list)  # `name`, `weight` and `licence` of each reward
    tags: list[str] = field(default_factory=lambda: ["trl", "apex", "grpo", "diffusers", "lora", "text-to-image"])
    trainer: str = "APEXTrainer"
    adapter: bool = True  # or all weights
    denoiser: str = "transformer"  # the trained part of the pipeline
    rule: str = "apex"  # how the rewards were combined
    datasets: list[str] = field(default_factory=list)  # hub ids of the prompts
    licence: str | None = None  # of the weights; the base model's terms apply as well
    ema_decay: float | None = None  # where the weights are a moving average


def write_model_card(run_dir: str | Path, facts: CardFacts, repo_id: str | None = None) -> Path:
    """Write `README.md` from the facts and the other files of the run directory, and keep the facts for later."""
    run_dir = Path(run_dir)
    (run_dir / FACTS_FILE).write_text(json.dumps(redacted(asdict(facts)), indent=1))
    base = facts.base_model
    hub_model = base if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not Path(base).exists() else None
    samples = _samples(run_dir)
    data = ModelCardData(
        base_model=hub_model,
        library_name="diffusers",
        license=facts.licence,
        pipeline_tag="image-to-image" if "image-to-image" in facts.tags else "text-to-image",
        tags=[tag for tag in facts.tags if facts.adapter or tag != "lora"],
        datasets=facts.datasets or None,
        widget=[{"text": s["prompt"], "output": {"url": s["image"]}} for s in samples[:6]] or None,
    )
    name = repo_id or (run_dir.name if run_dir.is_absolute() else str(run_dir))
    text, path = _render(run_dir, facts, name, hub_model, samples), run_dir / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def refresh_model_card(run_dir: str | Path, repo_id: str | None = None) -> Path:
    """Write the card anew, with the facts kept from the last time, or with what the run directory tells."""
    run_dir = Path(run_dir)
    kept = read_json(run_dir / FACTS_FILE)
    if not kept:
        config, adapter = read_json(run_dir / "config.json"), read_json(run_dir / "adapter_config.json")
        names = list(read_json(run_dir / "summary.json").get("objectives", {}))
        kept = {
            "base_model": str(config.get("model") or adapter.get("base_model_name_or_path") or ""),
            "objectives": [{"name": name, "weight": None, "licence": ""} for name in names],
            "adapter": bool(adapter),
            "rule": config.get("multi_objective_aggregation", "apex"),
        }
    known = {name: kept[name] for name in CardFacts.__dataclass_fields__ if name in kept}
    return write_model_card(run_dir, CardFacts(**known), repo_id)


def _render(run_dir: Path, facts: CardFacts, repo_id: str, hub_model: str | None, samples: list) -> str:
    """The text of the card: `model_card.md.jinja`, filled from the files of the run directory."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": _cell, "figure": _figure}
    template = environment.from_string((files(__package__) / "model_card.md.jinja").read_text(encoding="utf-8"))
    summary, recorded, config = (read_json(run_dir / f"{n}.json") for n in ("summary", "environment", "config"))
    figures = {path.stem: f"figures/{path.name}" for path in (run_dir / "figures").glob("*.png")}
    prompt = samples[0]["prompt"] if samples else "a red circle"
    return template.render(
        facts=facts,
        repo_id=repo_id,
        name=Path(repo_id).resolve().name,
        hub_model=hub_model,
        base_name=hub_model or Path(facts.base_model).name or "its base model",
        results=[
            {"name": name, "trained": part == "objectives", **row}
            for part in ("objectives", "held_out")
            for name, row in (summary.get(part) or {}).items()
        ],
        figures={"samples": "", "rewards": "", "priorities": ""} | figures,
        config=redacted({key: value for key, value in config.items() if value not in (None, "", [], {})}),
        command=redacted(recorded.get("command", "")),
        versions=recorded.get("versions", {}),
        steps=read_json(run_dir / "trainer_state.json").get("global_step"),
        report=(run_dir / "report.html").is_file(),
        state=(run_dir / "aggregator_state.json").is_file(),
        prompt=json.dumps(prompt, ensure_ascii=False),
    )


def _samples(run_dir: Path) -> list[dict[str, str]]:
    images = sorted((run_dir / "samples").glob("tuned_*.png"), key=lambda path: (len(path.stem), path.stem))
    prompts = list(read_json(run_dir / "samples" / "prompts.json"))
    numbered = [(int(path.stem.rpartition("_")[2]), f"samples/{path.name}") for path in images]
    return [{"prompt": str(prompts[i]["prompt"]), "image": name} for i, name in numbered if i < len(prompts)]


def read_json(path: Path) -> Any:
    """What a JSON file holds; an empty dictionary where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file. Found {error}. Restore it, or delete it.") from error


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table."""
    plain = " ".join(str(value).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _figure(value: Any, sign: bool = False) -> str:
    """A number for the table of results."""
    if not isinstance(value, int | float) or value != value:
        return ""
    return f"{value:{'+' if sign else ''}.3f}".replace("-", "\N{MINUS SIGN}")
