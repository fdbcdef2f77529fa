"""What must not occur in the code, beyond what ruff and import-linter check (`make check`): read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trl_apex"
HEAVY = ("torch", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "numpy", "PIL", "jaxtyping")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_aggregation_needs_torch_alone():
    allowed = {"torch", "torchjd", "jaxtyping", *sys.stdlib_module_names}
    for path in (PACKAGE / "aggregation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name(path)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in allowed, name(path)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{name(path)} imports from outside aggregation"


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


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that could run what a file or a server sent."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            found += [f"{key}=True" for key in ("trust_remote_code", "allow_pickle") if keywords.get(key) == "True"]
    return found


def test_nothing_that_was_downloaded_is_run():
    for folder in (PACKAGE, ROOT / "examples", ROOT / "benchmarks", ROOT / "tools"):
        for path in folder.rglob("*.py"):
            assert not unsafe(ast.parse(path.read_text())), name(path)


@pytest.mark.parametrize(
    "code", ["torch.load(f)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "np.load(f, allow_pickle=True)"]
)
def test_the_search_finds_it(code):
    assert unsafe(ast.parse(code))


def test_the_search_lets_ordinary_code_pass():
    assert not unsafe(ast.parse("model.eval(); torch.load(f, weights_only=True); f(trust_remote_code=self.trust)"))
