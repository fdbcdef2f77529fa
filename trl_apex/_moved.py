"""Old import paths: each still works for one release, with a FutureWarning that names the new one."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from functools import partial
from typing import Any

# Module -> the old modules whose names it holds now, all of them in trl_apex.
_NEW_TO_OLD = {
    "aggregation.conflict": "aggregation.population",
    "aggregation.metrics": "aggregation.diagnostics",
    "aggregation.normalize": "aggregation.outliers",
    "aggregation.options": "aggregation.checks",
    "aggregation.priority": "aggregation.potential aggregation.progress aggregation.schedule",
    "aggregation.rules": "aggregation.surgery",
    "diffusion.families": "policy.load",
    "diffusion.families.base": "policy.base",
    "diffusion.families.flux": "policy.flux",
    "diffusion.families.sd3": "policy.sd3",
    "diffusion.families.stable_diffusion": "policy.stable_diffusion",
    "diffusion.losses": "loss loss.kl loss.surrogate",
    "diffusion.nouns": "types",
    "diffusion.rollout": "policy.velocity rollout.denoise rollout.noise rollout.sample",
    "diffusion.schedule": "policy.sampler",
    "diffusion.transition": "policy.transition",
    "evaluation.measures": "evaluation.comparison evaluation.reward_hacking",
    "evaluation.run": "evaluate",
    "prompts.datasets": "prompts.dataset prompts.from_function prompts.text_prompts",
    "prompts.embeddings": "prompts.embedding_store prompts.fingerprint trainer.prompt_encoding",
    "prompts.sampler": "trainer.rows",
    "report.figures": "report.grid report.samples",
    "rewards.base": "rewards.from_ddpo rewards.images rewards.protocol rewards.weights",
    "rewards.clip": "rewards.aesthetic rewards.clip_score rewards.hpsv2 rewards.image_tower rewards.pickscore",
    "rewards.registry": "rewards.by_name",
    "rewards.scoring": "rewards.calling rewards.failure rewards.lane",
    "rewards.vision": "rewards.jpeg",
    "serving.client": "rewards.remote",
    "serving.server": "rewards.batching rewards.limits rewards.server",
    "serving.wire": "rewards.wire",
    "tiny.pipeline": "tiny.tokenizer",
    "trainers.adapters": "policy.adapters trainer.lora",
    "trainers.apex": "trainer.apex_trainer",
    "trainers.callbacks": "trainer.callbacks trainer.monitor trainer.progress",
    "trainers.checkpoint": "trainer.fit trainer.saving",
    "trainers.config": "trainer.aggregation_fields trainer.apex_config trainer.apex_grpo_config "
    "trainer.diffusion_grpo_config trainer.field_types",
    "trainers.detectors": "trainer.detectors",
    "trainers.diffusion_grpo": "trainer.diffusion_grpo_trainer",
    "trainers.evaluation": "trainer.evaluating",
    "trainers.inputs": "trainer.inputs",
    "trainers.language": "trainer.apex_grpo_trainer",
    "trainers.logs": "trainer.logs trainer.pictures trainer.run_record",
    "trainers.manifest": "trainer.checkpoint trainer.disk",
    "trainers.probe": "trainer.gradient_probe",
    "trainers.publishing": "hub hub.card hub.failure hub.upload trainer.publishing",
    "trainers.trl_seam": "trainer.trl_seam",
    "trainers.weights": "trainer.denoiser trainer.ema",
}
MOVED = {f"trl_apex.{old}": f"trl_apex.{new}" for new, olds in _NEW_TO_OLD.items() for old in olds.split()}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the new module under the old name."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = any(old.startswith(f"{fullname}.") for old in MOVED)
        if package or fullname in MOVED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=package)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        if hasattr(module, "__path__"):  # stays a package, or the old paths of its modules would be gone
            module.__dict__["__getattr__"] = partial(_name_of_package, old)
        else:
            _warn(old)
            sys.modules[old] = importlib.import_module(MOVED[old])


def _name_of_package(old: str, name: str) -> Any:
    if old not in MOVED or name.startswith("__"):
        raise AttributeError(f"module {old!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(MOVED[old]), name)
    _warn(old)
    return value


def _warn(old: str) -> None:
    message = f"`{old}` has moved to `{MOVED[old]}`. Import it from there."
    warnings.warn(message, FutureWarning, stacklevel=3)


def install() -> None:
    """Let the old import paths work."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
