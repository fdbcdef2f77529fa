"""Old import paths: each still works for one release, with a FutureWarning that names the new one."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

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
    "trl_apex.hub.failure": "trl_apex.hub.upload",
    "trl_apex.report.grid": "trl_apex.report.figures",
    "trl_apex.report.run": "trl_apex.report.page",
    "trl_apex.report.samples": "trl_apex.report.figures",
    "trl_apex.rewards.batching": "trl_apex.serving.server",
    "trl_apex.rewards.calling": "trl_apex.rewards.scoring",
    "trl_apex.rewards.failure": "trl_apex.rewards.scoring",
    "trl_apex.rewards.lane": "trl_apex.rewards.scoring",
    "trl_apex.rewards.limits": "trl_apex.serving.server",
    "trl_apex.rewards.remote": "trl_apex.serving.client",
    "trl_apex.rewards.server": "trl_apex.serving.server",
    "trl_apex.rewards.wire": "trl_apex.serving.wire",
    "trl_apex.tiny.tokenizer": "trl_apex.tiny.pipeline",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the new module under the old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        warnings.warn(f"`{old}` has moved to `{MOVED[old]}`. Import it from there.", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Let the old import paths work."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
