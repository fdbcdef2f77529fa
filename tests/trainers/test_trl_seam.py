"""What the installed TRL release expects of a GRPOTrainer whose own constructor never runs.

The inherited methods' syntax trees are read, so that a failure names the attribute and the release that brought it.
"""

import ast
import inspect
import textwrap

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig
from toy_rewards import PROMPTS, contrast, redness
from transformers import Trainer
from trl import GRPOTrainer

from trl_apex import APEXGRPOTrainer, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.tiny.pipeline import build_pipeline
from trl_apex.trainers.trl_seam import INHERITED

RELEASE = f"trl {trl.__version__}"
# Overrides of Trainer's hooks that this package leaves in place, beside those of `INHERITED`.
DATA_LOADING = ("get_train_dataloader", "get_eval_dataloader", "_get_eval_sampler")


def source_tree(function) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def self_attributes(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, context)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def trl_classes() -> list[type]:
    mro = GRPOTrainer.__mro__
    return list(mro[: mro.index(Trainer)])


@pytest.fixture(scope="module")
def diffusion_trainer(tmp_path_factory):
    config = DiffusionGRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        use_cpu=True,
        per_device_train_batch_size=4,
        num_generations=2,
        num_inference_steps=3,
        gradient_accumulation_steps=2,
    )
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    return DiffusionGRPOTrainer(build_pipeline(0), [redness, contrast], config, dataset, peft_config=LoraConfig(r=2))


@pytest.mark.parametrize("method", INHERITED + DATA_LOADING)
def test_every_attribute_that_an_inherited_method_reads_is_set(diffusion_trainer, method):
    function = getattr(GRPOTrainer, method, None)
    assert function is not None, f"{RELEASE} has no GRPOTrainer.{method}: update trl_apex/trainers/trl_seam.py"
    set_by_trainer = self_attributes(source_tree(Trainer), ast.Store)
    known = set(dir(diffusion_trainer)) | set_by_trainer
    missing = self_attributes(source_tree(function), ast.Load) - known
    assert not missing, (
        f"{RELEASE}: GRPOTrainer.{method} reads {sorted(missing)}, which DiffusionGRPOTrainer does not set. "
        "Set them in trl_apex/trainers/trl_seam.py"
    )


def test_no_release_overrides_a_hook_of_trainer_behind_our_back():
    hooks = {
        name
        for owner in trl_classes()
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and hasattr(Trainer, name)
    }
    left_in_place = {name for name in hooks if getattr(DiffusionGRPOTrainer, name) is getattr(GRPOTrainer, name)}
    new = left_in_place - set(INHERITED) - set(DATA_LOADING)
    assert not new, (
        f"{RELEASE} overrides {sorted(new)} of transformers.Trainer. Override these in DiffusionGRPOTrainer, or "
        "add them to INHERITED in trl_apex/trainers/trl_seam.py once their attributes are set"
    )


def test_what_the_diffusion_trainer_overrides_or_calls_still_exists_with_the_same_parameters():
    expected = {
        "_prepare_inputs": ["self", "generation_batch"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_get_train_sampler": ["self", "dataset"],
        "_set_signature_columns_if_needed": ["self"],
        "_send_telemetry": ["self"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "_load_rng_state": ["self", "checkpoint"],
        "_load_best_model": ["self"],
        "_determine_best_metric": ["self", "metrics", "trial"],
        "_save": ["self", "output_dir", "state_dict"],
        "_save_optimizer_and_scheduler": ["self", "output_dir"],
        "_save_rng_state": ["self", "output_dir"],
        "_save_scaler": ["self", "output_dir"],
        "_run_epoch": None,
        "_finalize_training": None,
        "create_model_card": None,
    }
    for method, parameters in expected.items():
        function = getattr(GRPOTrainer, method, None)
        assert function is not None, f"{RELEASE} has no GRPOTrainer.{method}, which DiffusionGRPOTrainer needs"
        if parameters is not None:
            found = list(inspect.signature(inspect.unwrap(function)).parameters)
            assert found == parameters, f"{RELEASE}: GRPOTrainer.{method} takes {found} instead of {parameters}"


def test_no_release_saves_more_state_than_our_checkpoints():
    """`trl_apex.trainers.checkpoint.save` stands in for Trainer's `_save_checkpoint`."""
    saved = {
        n for n in self_attributes(source_tree(Trainer._save_checkpoint), ast.Load) if n.lstrip("_").startswith("save")
    }
    known = {"save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"}
    assert saved == known, f"transformers saves {sorted(saved ^ known)} too: update trl_apex/trainers/checkpoint.py"


def test_the_check_sees_an_attribute_that_nobody_sets():
    class Newer(GRPOTrainer):
        def log(self, logs, start_time=None):
            return self._brand_new_attribute

    assert self_attributes(source_tree(Newer.log), ast.Load) == {"_brand_new_attribute"}


def test_the_constructor_takes_the_arguments_of_trls_in_its_order():
    ours = list(inspect.signature(DiffusionGRPOTrainer.__init__).parameters)
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    language_only = {"tools", "rollout_func", "environment_factory"}
    expected = [name for name in theirs if name not in language_only]
    assert ours[: len(expected)] == expected, f"{RELEASE}: GRPOTrainer takes {theirs}"


@pytest.mark.parametrize("trainer", [DiffusionGRPOTrainer, APEXTrainer, APEXGRPOTrainer])
@pytest.mark.parametrize(
    "method", ["train", "evaluate", "predict", "save_model", "push_to_hub", "create_model_card", "log"]
)
def test_methods_take_trls_arguments_in_its_order(trainer, method):
    ours, theirs = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (trainer, GRPOTrainer))
    theirs = [name for name in theirs if name != "kwargs"]
    assert ours[: len(theirs)] == theirs


def test_help_shows_the_signature_of_the_constructor():
    assert inspect.signature(APEXTrainer) == inspect.signature(DiffusionGRPOTrainer)
    assert inspect.signature(APEXGRPOTrainer) == inspect.signature(GRPOTrainer)
    kinds = {parameter.kind for parameter in inspect.signature(APEXTrainer).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_help_shows_methods_as_methods():
    own = {
        name: list(inspect.signature(method).parameters)
        for trainer in (APEXTrainer, APEXGRPOTrainer)
        for name, method in inspect.getmembers(trainer, inspect.isfunction)
        if method.__module__.startswith("trl_apex")
    }
    assert {"evaluate", "save_model", "push_to_hub", "_save_checkpoint"} <= own.keys()
    assert {parameters[0] for parameters in own.values()} == {"self"}
