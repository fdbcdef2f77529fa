"""Old import paths: each still works for one release, with a FutureWarning that names the new one."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

# Old module -> the module that holds its names now.
MOVED = {
    "trl_apex.aggregation.checks": "trl_apex.aggregation.options",
    "trl_apex.aggregation.diagnostics": "trl_apex.aggregation.metrics",
    "trl_apex.aggregation.outliers": "trl_apex.aggregation.normalize",
    "trl_apex.aggregation.population": "trl_apex.aggregation.conflict",
    "trl_apex.aggregation.potential": "trl_apex.aggregation.priority",
    "trl_apex.aggregation.progress": "trl_apex.aggregation.priority",
    "trl_apex.aggregation.schedule": "trl_apex.aggregation.priority",
    "trl_apex.aggregation.surgery": "trl_apex.aggregation.rules",
    "trl_apex.evaluate": "trl_apex.evaluation.run",
    "trl_apex.evaluation.comparison": "trl_apex.evaluation.measures",
    "trl_apex.evaluation.reward_hacking": "trl_apex.evaluation.measures",
    "trl_apex.hub": "trl_apex.trainers.publishing",
    "trl_apex.hub.card": "trl_apex.trainers.publishing",
    "trl_apex.hub.failure": "trl_apex.trainers.publishing",
    "trl_apex.hub.upload": "trl_apex.trainers.publishing",
    "trl_apex.loss": "trl_apex.diffusion.losses",
    "trl_apex.loss.kl": "trl_apex.diffusion.losses",
    "trl_apex.loss.surrogate": "trl_apex.diffusion.losses",
    "trl_apex.policy.adapters": "trl_apex.trainers.weights",
    "trl_apex.policy.base": "trl_apex.diffusion.families.base",
    "trl_apex.policy.flux": "trl_apex.diffusion.families.flux",
    "trl_apex.policy.load": "trl_apex.diffusion.families",
    "trl_apex.policy.sampler": "trl_apex.diffusion.schedule",
    "trl_apex.policy.sd3": "trl_apex.diffusion.families.sd3",
    "trl_apex.policy.stable_diffusion": "trl_apex.diffusion.families.stable_diffusion",
    "trl_apex.policy.transition": "trl_apex.diffusion.transition",
    "trl_apex.policy.velocity": "trl_apex.diffusion.rollout",
    "trl_apex.prompts.dataset": "trl_apex.prompts.datasets",
    "trl_apex.prompts.embedding_store": "trl_apex.prompts.embeddings",
    "trl_apex.prompts.fingerprint": "trl_apex.prompts.embeddings",
    "trl_apex.prompts.from_function": "trl_apex.prompts.datasets",
    "trl_apex.prompts.text_prompts": "trl_apex.prompts.datasets",
    "trl_apex.report.grid": "trl_apex.report.figures",
    "trl_apex.report.run": "trl_apex.report.page",
    "trl_apex.report.samples": "trl_apex.report.figures",
    "trl_apex.rewards.aesthetic": "trl_apex.rewards.clip",
    "trl_apex.rewards.batching": "trl_apex.serving.server",
    "trl_apex.rewards.by_name": "trl_apex.rewards.registry",
    "trl_apex.rewards.calling": "trl_apex.rewards.scoring",
    "trl_apex.rewards.clip_score": "trl_apex.rewards.clip",
    "trl_apex.rewards.failure": "trl_apex.rewards.scoring",
    "trl_apex.rewards.from_ddpo": "trl_apex.rewards.base",
    "trl_apex.rewards.hpsv2": "trl_apex.rewards.clip",
    "trl_apex.rewards.image_tower": "trl_apex.rewards.clip",
    "trl_apex.rewards.images": "trl_apex.rewards.base",
    "trl_apex.rewards.lane": "trl_apex.rewards.scoring",
    "trl_apex.rewards.limits": "trl_apex.serving.server",
    "trl_apex.rewards.pickscore": "trl_apex.rewards.clip",
    "trl_apex.rewards.protocol": "trl_apex.rewards.base",
    "trl_apex.rewards.remote": "trl_apex.serving.client",
    "trl_apex.rewards.server": "trl_apex.serving.server",
    "trl_apex.rewards.weights": "trl_apex.rewards.base",
    "trl_apex.rewards.wire": "trl_apex.serving.wire",
    "trl_apex.rollout.denoise": "trl_apex.diffusion.rollout",
    "trl_apex.rollout.noise": "trl_apex.diffusion.rollout",
    "trl_apex.rollout.sample": "trl_apex.diffusion.rollout",
    "trl_apex.tiny.tokenizer": "trl_apex.tiny.pipeline",
    "trl_apex.trainer.aggregation_fields": "trl_apex.trainers.config",
    "trl_apex.trainer.apex_config": "trl_apex.trainers.config",
    "trl_apex.trainer.apex_grpo_config": "trl_apex.trainers.config",
    "trl_apex.trainer.apex_grpo_trainer": "trl_apex.trainers.language",
    "trl_apex.trainer.apex_trainer": "trl_apex.trainers.apex",
    "trl_apex.trainer.callbacks": "trl_apex.trainers.callbacks",
    "trl_apex.trainer.checkpoint": "trl_apex.trainers.checkpoint",
    "trl_apex.trainer.denoiser": "trl_apex.trainers.weights",
    "trl_apex.trainer.detectors": "trl_apex.trainers.detectors",
    "trl_apex.trainer.diffusion_grpo_config": "trl_apex.trainers.config",
    "trl_apex.trainer.diffusion_grpo_trainer": "trl_apex.trainers.diffusion_grpo",
    "trl_apex.trainer.disk": "trl_apex.trainers.checkpoint",
    "trl_apex.trainer.ema": "trl_apex.trainers.weights",
    "trl_apex.trainer.evaluating": "trl_apex.trainers.evaluation",
    "trl_apex.trainer.field_types": "trl_apex.trainers.config",
    "trl_apex.trainer.fit": "trl_apex.trainers.checkpoint",
    "trl_apex.trainer.gradient_probe": "trl_apex.trainers.probe",
    "trl_apex.trainer.inputs": "trl_apex.trainers.inputs",
    "trl_apex.trainer.logs": "trl_apex.trainers.logs",
    "trl_apex.trainer.lora": "trl_apex.trainers.weights",
    "trl_apex.trainer.monitor": "trl_apex.trainers.callbacks",
    "trl_apex.trainer.pictures": "trl_apex.trainers.logs",
    "trl_apex.trainer.progress": "trl_apex.trainers.callbacks",
    "trl_apex.trainer.prompt_encoding": "trl_apex.prompts.embeddings",
    "trl_apex.trainer.publishing": "trl_apex.trainers.publishing",
    "trl_apex.trainer.rows": "trl_apex.prompts.sampler",
    "trl_apex.trainer.run_record": "trl_apex.trainers.logs",
    "trl_apex.trainer.saving": "trl_apex.trainers.checkpoint",
    "trl_apex.trainer.trl_seam": "trl_apex.trainers.trl_seam",
    "trl_apex.types": "trl_apex.diffusion.nouns",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the new module under the old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = any(old.startswith(f"{fullname}.") for old in MOVED)
        if not package and fullname not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=package)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        if hasattr(module, "__path__"):  # stays a package, or the old paths of its modules would be gone
            module.__dict__["__getattr__"] = partial(_name_of_package, old)
        else:
            _warn(old, stacklevel=3)
            sys.modules[old] = importlib.import_module(MOVED[old])


def _name_of_package(old: str, name: str) -> Any:
    if old not in MOVED or name.startswith("__"):
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(MOVED[old]), name)
    _warn(old, stacklevel=3)
    return value


def _warn(old: str, stacklevel: int) -> None:
    message = f"`{old}` has moved to `{MOVED[old]}`. Import it from there."
    warnings.warn(message, FutureWarning, stacklevel=stacklevel)


def install() -> None:
    """Let the old import paths work."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
