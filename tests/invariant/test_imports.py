"""What may import what, and what must not occur in the code at all: read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trl_apex"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# Imports go down: a part may import parts of lower rank, and itself. The stages, all of rank 2, never import each other.
RANK = {"_moved": 0, "types": 0, "distributed": 0, "redact": 0, "policy": 1}
RANK |= dict.fromkeys(("prompts", "rollout", "rewards", "aggregation", "loss", "evaluation", "report", "hub"), 2)
RANK |= {"serving": 3, "tiny": 3, "trainer": 4, "demo": 5, "evaluate": 5, "plan": 5, "cli": 6, "__main__": 7}
HEAVY = ("torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "numpy", "PIL", "jaxtyping")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> list[str]:
    return ["trl_apex", *path.relative_to(PACKAGE).parent.parts]


def imported(path: Path, tree: ast.AST | None = None) -> list[str]:
    """Full dotted names of everything a file imports, at its top or inside functions."""
    found = []
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def own_parts(path: Path) -> set[str]:
    names = (dotted.split(".") for dotted in imported(path))
    parts = {parts[1] for parts in names if parts[0] == "trl_apex" and len(parts) > 1}
    return parts & set(RANK)


def top_level_imports(path: Path) -> set[str]:
    """Packages imported when the file itself is, `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {dotted.split(".")[0] for dotted in imported(path, ast.Module(body, []))}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in RANK, f"{name(path)} belongs to no layer: give `{part}` a rank here"
    for other in own_parts(path) - {part}:
        assert RANK[other] < RANK[part], (
            f"{name(path)} imports trl_apex.{other}: {part} (layer {RANK[part]}) may import lower layers only, "
            f"and {other} is in layer {RANK[other]}"
        )


def test_aggregation_needs_torch_alone():
    allowed = {"torch", "jaxtyping", "trl_apex", *sys.stdlib_module_names}
    for path in (PACKAGE / "aggregation").glob("*.py"):
        assert top_level_imports(path) <= allowed, name(path)
        assert own_parts(path) <= {"aggregation", "types"}, name(path)
        packages = {dotted.split(".")[0] for dotted in imported(path)}
        assert packages <= allowed | {"torchjd"}, name(path)


def test_collectives_are_called_in_one_file():
    for path in FILES:
        if part_of(path) != "distributed":
            assert not [d for d in imported(path) if d.startswith("torch.distributed")], name(path)
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
            assert not [node for node in calls if ast.unparse(node).startswith("torch.distributed")], name(path)


@pytest.mark.parametrize("module", ["trl_apex", "trl_apex.cli"])
def test_nothing_heavy_is_imported_at_the_door(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    import trl_apex

    for public in trl_apex.__all__:
        assert getattr(trl_apex, public) is not None
    assert set(trl_apex.__all__) <= set(dir(trl_apex))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = trl_apex.Nothing


def forbidden(tree: ast.AST) -> list[str]:
    """What must not be done with data that came from elsewhere."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
            found += [f"import of {n}" for n in names if n.split(".")[0] in bad]
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "yaml.load", "__import__"):
            found.append(called)
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if keywords.get("shell") == "True":
            found.append("shell=True")
        if keywords.get("trust_remote_code") == "True":
            found.append("trust_remote_code=True")
        if keywords.get("allow_pickle") == "True":
            found.append("allow_pickle=True")
    return found


def test_nothing_is_unpickled_evaluated_or_run_in_a_shell():
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in [*FILES, *scripts]:
        assert not forbidden(ast.parse(path.read_text())), name(path)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "torch.load(f)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds_it(code):
    assert forbidden(ast.parse(code))


def test_the_search_lets_ordinary_code_pass():
    assert not forbidden(ast.parse("model.eval(); torch.load(f, weights_only=True); f(trust_remote_code=self.trust)"))


def test_relative_imports_are_resolved():
    path = PACKAGE / "trainer" / "apex_trainer.py"
    tree = ast.parse(
        "from ..policy.base import DiffusionPolicy\nfrom . import lora\nfrom trl_apex.types import Schedule"
    )
    assert imported(path, tree) == [
        "trl_apex.policy.base.DiffusionPolicy",
        "trl_apex.trainer.lora",
        "trl_apex.types.Schedule",
    ]
