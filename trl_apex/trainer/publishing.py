"""How a trainer reaches the Hub: Trainer's entry points, uploading what diffusers loads and no secret."""

import copy
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..hub import CardFacts, PushError, push_run, write_model_card
from ..hub.upload import is_uploaded, trying
from ..report import write_figures
from .denoiser import save_denoiser

logger = logging.getLogger(__name__)


def without_token(args: Any) -> tuple[Any, str | None]:
    """The arguments without the token of the Hub, and the token: `training_args.bin` is written in every checkpoint.

    Args:
        args (`transformers.TrainingArguments`): the user's; not changed.
    """
    if not args.hub_token:
        return args, None
    token, args = args.hub_token, copy.copy(args)
    args.hub_token = None
    return args, token


class PublishingMixin:
    """`push_to_hub()`, `push_to_hub=True` with its strategies, and the model card.

    Trainer would upload `training_args.bin` with the token in it, leave out the adapter that diffusers loads, and lose
    errors of intermediate uploads. Here an upload takes along what `trl_apex.hub.upload.UPLOADED` names, in one commit.
    """

    _hub_token: str | None = None

    def init_hf_repo(self: Any, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it, before any compute.

        Raises:
            PushError: if the token, the name or the connection will not do.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self._hub_token)
        repo = trying(lambda: api.create_repo(name, private=private, exist_ok=True), name, None, api.endpoint)
        self.hub_model_id = repo.repo_id
        self.push_in_progress = None

    def push_to_hub(
        self: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        hub_model_id: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it with its card; returns the repository's address, or a future of it.

        Every rank must call it; the main process uploads. The repository is `hub_model_id`, here or in the configuration;
        by default it is named after `output_dir`.

        Raises:
            ValueError: if the commit message is the name of a repository.
            PushError: if the upload fails. The model is saved by then, and `trl-apex push` tries again.
        """
        if commit_message and re.fullmatch(r"[\w.-]+/[\w.-]+", commit_message):
            raise ValueError(
                "The first argument of `push_to_hub` is the commit message. Found what looks like a repository, "
                f'{commit_message!r}. Pass hub_model_id="{commit_message}", here or in the configuration.'
            )
        if hub_model_id is not None:
            self.args.hub_model_id, self.hub_model_id = hub_model_id, None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.pop("model_name", None)
        self.state.save_to_json(os.path.join(self.args.output_dir, "trainer_state.json"))
        try:
            write_figures(self.args.output_dir)
        except ImportError as error:
            logger.warning("The model card has no pictures: %s", error)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options: dict[str, Any] = {
            "token": token or self._hub_token,
            "revision": revision or self.args.hub_revision,
            "create": False,
            "commit_message": commit_message or "End of training",
        }
        if blocking:
            return push_run(self.args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(push_run, self.args.output_dir, self.hub_model_id, **options)

    def create_model_card(
        self: Any, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Write the model card of the run as it stands.

        Args:
            model_name (`str`, *optional*): by default the name of the repository or of the output directory.
            dataset_name (`str`, *optional*): hub id of the prompts.
            tags (`str` or `list[str]`, *optional*): further tags.
            kwargs: `license`; Trainer's other keywords are accepted and have no meaning here.
        """
        if not self.is_world_process_zero():
            return
        further = [tags] if isinstance(tags, str) else list(tags or [])
        adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        weights = self.reward_weights.tolist()
        facts = CardFacts(
            base_model=str(getattr(self.policy.pipeline.config, "_name_or_path", "") or ""),
            objectives=[
                {"name": name, "weight": weight, "licence": getattr(func, "weights_licence", "")}
                for name, weight, func in zip(self.reward_func_names, weights, self.reward_funcs, strict=True)
            ],
            tags=list(dict.fromkeys([*self._tag_names, *(["lora"] if adapter else []), *further])),
            trainer=type(self).__name__,
            adapter=adapter,
            denoiser=self.policy.denoiser_name,
            rule=self.args.multi_objective_aggregation,
            datasets=[dataset_name] if dataset_name else [],
            licence=kwargs.get("license"),
            ema_decay=self.args.ema_decay,
        )
        write_model_card(self.args.output_dir, facts, getattr(self, "hub_model_id", None) or model_name)

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        """Upload a whole checkpoint in the background, by `hub_strategy`; a failure is a warning."""
        strategy = self.args.hub_strategy
        if self._partial_dir is not None or strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.create_model_card()
        # The folder is laid out as the repository, out of links that outlive the checkpoint.
        staged = Path(tempfile.mkdtemp(prefix=".push-", dir=self.args.output_dir))
        checkpoint = Path(checkpoint_folder)
        left_out = {"README.md", *(("adapter_model.safetensors",) if self._ema is not None else ())}  # not averaged
        _link(checkpoint, staged, lambda path: is_uploaded(path) and path not in left_out)
        shutil.copy(Path(self.args.output_dir) / "README.md", staged)
        folder = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(str(strategy.value))
        if folder:
            _link(checkpoint, staged / folder)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel) and self._engine == "ddp":
            with self._ema.averaged() if self._ema is not None else nullcontext():
                save_denoiser(model, staged / self.policy.denoiser_name)
        api, repo_id = HfApi(token=self._hub_token), self.hub_model_id
        options = {"commit_message": f"Training in progress, {checkpoint.name}", "revision": self.args.hub_revision}

        def upload() -> None:
            try:
                once = partial(api.upload_folder, repo_id=repo_id, folder_path=staged, **options)
                trying(once, repo_id, None, api.endpoint)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        job = api.run_as_future(upload)
        job.add_done_callback(_report_failure)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)


def _link(source: Path, target: Path, keep: Callable[[str], bool] = lambda path: True) -> None:
    """The same files in another folder, as links where the disk has them; `keep` takes paths relative to `source`."""
    for path in [path for path in source.rglob("*") if path.is_file()]:
        name = path.relative_to(source)
        if keep(name.as_posix()):
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except OSError:
                shutil.copy(path, place)


def _report_failure(job: Future) -> None:
    error = job.exception()
    if error is not None:
        text = str(error) if isinstance(error, PushError) else f"{type(error).__name__} while uploading a checkpoint"
        logger.warning("%s The run goes on, and the next upload holds everything.", text)
