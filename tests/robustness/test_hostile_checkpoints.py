"""Checkpoints and adapters that are cut, altered, foreign or malicious: refused with a reason, never executed."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_runs import contrast, redness, tiny_pipeline, tiny_trainer

from trl_apex.diffusion.families.sd3 import SD3Policy
from trl_apex.trainers.adapters import adapted
from trl_apex.trainers.manifest import MANIFEST, PARTIAL, defects, finalize, last_valid, to_resume_from
from trl_apex.trainers.weights import LORA_FILE


def mostly_slow(values, *sample):
    """The values of a parameter, all but a sample of them marked as slow."""
    return [v if v in sample else pytest.param(v, marks=pytest.mark.slow) for v in values]


SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with two valid checkpoints."""
    run = tmp_path_factory.mktemp("original") / "run"
    tiny_trainer(run, **SAVING).train()
    return run


@pytest.fixture
def run(original, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def forge(checkpoint: Path) -> None:
    """Give a spoilt checkpoint a manifest that fits it, as whoever spoilt it on purpose would."""
    staged = checkpoint.parent / PARTIAL / checkpoint.name
    staged.parent.mkdir(exist_ok=True)
    checkpoint.rename(staged)
    finalize(staged, checkpoint, engine="ddp", world_size=1)
    assert defects(checkpoint) == []


class Malicious:
    """Unpickled, it leaves a sign."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


def test_the_malicious_pickle_would_run(tmp_path):
    sign = tmp_path / "sign"
    pickle.loads(pickle.dumps(Malicious(sign)))
    assert sign.exists(), "or the tests below show nothing"


def spoil(checkpoint: Path, source: random.Random) -> tuple[str, str]:
    """Flip a bit or cut the end, in a file and at a place drawn at random; the file and the harm."""
    path = source.choice(sorted(p for p in checkpoint.iterdir() if p.is_file()))
    content = bytearray(path.read_bytes())
    harm = source.choice(["flipped", "cut"])
    if harm == "cut":
        del content[source.randrange(len(content)) :]
    else:
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)
    return path.name, harm


def facts(checkpoint: Path) -> object:
    """What a manifest says, whatever its spaces."""
    return json.loads((checkpoint / MANIFEST).read_text())


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_damage_is_found_and_passed_over(count, original, run, figure):
    source, second, before = random.Random(1), run / "checkpoint-2", facts(original / "checkpoint-2")
    found, harmless = 0, 0
    for _ in range(count):
        name, harm = spoil(second, source)
        defect = defects(second)
        if not defect:  # a space of the manifest for another
            assert name == MANIFEST and facts(second) == before, (name, harm)
            harmless += 1
        else:
            assert name in defect[0], (name, harm, defect)
            assert to_resume_from(True, run).name == "checkpoint-1"
            with pytest.raises(ValueError, match="must be valid.*Resume from .*checkpoint-1"):
                to_resume_from(second, run)
            found += 1
        shutil.copy2(original / "checkpoint-2" / name, second / name)
    assert not defects(second) and found > 0.9 * count
    figure("random_damage", {"harms": count, "found": found, "without_effect": harmless, "missed": 0})


def refused(run: Path, match: str, **options) -> None:
    """Resuming the spoilt second checkpoint raises `match`, and nothing was trained."""
    trainer = tiny_trainer(run, **{**SAVING, "max_steps": 3, **options})
    with pytest.raises(ValueError, match=match) as error:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert "Found" in str(error.value)
    assert last_valid(run).name in ("checkpoint-1", "checkpoint-2")


@pytest.mark.parametrize(
    "name", mostly_slow(["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"], "rng_state.pth")
)
@pytest.mark.parametrize("forged", mostly_slow([False, True], True))
def test_a_pickle_in_place_of_a_state_is_not_run(name, forged, run, tmp_path):
    checkpoint, sign = run / "checkpoint-2", tmp_path / "sign"
    torch.save(Malicious(sign), checkpoint / name)
    if not forged:
        refused(run, f"must be valid. Found .*{name} has")
    else:
        forge(checkpoint)
        if name == "training_args.bin":  # which nothing reads
            tiny_trainer(run, **{**SAVING, "max_steps": 3}).train(resume_from_checkpoint=str(checkpoint))
        else:
            message = "must hold tensors and numbers only. Found something else in .*checkpoint-2, which was not run"
            refused(run, message)
    assert not sign.exists()


@pytest.mark.parametrize(
    "name", mostly_slow(["adapter_model.bin", "pytorch_model.bin", "adapter_model.safetensors"], "adapter_model.bin")
)
def test_a_pickle_in_place_of_the_weights_is_not_run(name, run, tmp_path):
    checkpoint, sign = run / "checkpoint-2", tmp_path / "sign"
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Malicious(sign)))
    forge(checkpoint)
    refused(run, "Weights must be a safetensors file" if name.endswith("safetensors") else f"Found {name} in")
    assert not sign.exists()


@pytest.mark.parametrize(
    "name",
    mostly_slow(["adapter_model.bin", "pytorch_model.bin", "optimizer.bin", "model.safetensors"], "pytorch_model.bin"),
)
def test_a_file_beside_the_weights_is_refused(name, run, tmp_path):
    sign = tmp_path / "sign"
    (run / "checkpoint-2" / name).write_bytes(pickle.dumps(Malicious(sign)))
    refused(run, f"in adapter_model.safetensors alone. Found .*{name}")
    assert not sign.exists()


OTHER = {
    "rank": ({"lora": LoraConfig(r=3, lora_alpha=4)}, r"weights that differ, e.g. .* in .*adapter_model.safetensors"),
    "scale": (
        {"lora": LoraConfig(r=2, lora_alpha=64)},
        "`lora_alpha` that it was saved with, 4 in .*adapter_config.json. Found 64",
    ),
    "layers": (
        {"lora": LoraConfig(r=2, lora_alpha=4, target_modules=["attn.to_q"])},
        "must be of the same model and adapter. Found .*that differ",
    ),
    "no_adapter": ({"lora": None}, "all weights, in model.safetensors alone. Found adapter_model.safetensors in"),
    "objectives": ({"rewards": (contrast, redness)}, "saved state must be for the objectives"),
    "fewer_objectives": ({"rewards": (redness,)}, "saved state must be for the objectives"),
    "rule": ({"multi_objective_aggregation": "dvao"}, "saved state must be for the rule 'dvao'"),
}


@pytest.mark.parametrize("other", mostly_slow(OTHER, "rank", "objectives"))
def test_a_checkpoint_of_something_else_is_refused(other, run):
    options, message = OTHER[other]
    refused(run, message, **options)


@pytest.mark.slow
def test_weights_under_other_names_are_refused(run):
    file = run / "checkpoint-2" / "adapter_model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(file).items()}, file)
    forge(run / "checkpoint-2")
    refused(run, "must be of the same model and adapter. Found .*that differ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must hold the state of the aggregator"),
        (
            {"aggregator": {"objectives": ["redness", "contrast"], "rule": "apex", "iteration": 2}},
            "saved state must hold .*Found no .*priorities",
        ),
    ],
)
def test_half_a_state_is_refused(state, message, run):
    file = run / "checkpoint-2" / "apex_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **state} if state else {}))
    forge(run / "checkpoint-2")
    refused(run, message)


@pytest.mark.parametrize(
    "file, content",
    [
        ("apex_state.json", "[]"),
        ("apex_state.json", '{"aggregator": []}'),
        ("apex_state.json", '{"aggregator": {"rule": "apex"}}'),
        ("trainer_state.json", "{}"),
        ("apex_state.json", '{"monitor": {"first": {"eval": 1}, "warned": false}}'),
        ("apex_state.json", '{"detectors": {"first": {}, "sketch": null, "warned": "x"}}'),
        ("trainer_state.json", '{"global_step": 2, "max_steps": 2, "log_history": [5]}'),
        ("trainer_state.json", '{"global_step": 2, "max_steps": 2, "log_history": [], "unknown": 1}'),
        ("trainer_state.json", '{"global_step": 2, "max_steps": 2, "log_history": [], "best_metric": "a"}'),
        ("trainer_state.json", '{"global_step": -2, "max_steps": 2, "log_history": []}'),
        pytest.param("trainer_state.json", "[" * 100_000, id="deeply nested"),
        ("adapter_config.json", '{"lora_alpha": 4'),
        ("adapter_config.json", "{}"),
    ],
)
def test_a_state_file_of_a_wrong_form_is_refused_by_name(file, content, run):
    path = run / "checkpoint-2" / file
    if file == "apex_state.json" and content[0] == "{":  # the other states stay as they are
        content = json.dumps({**json.loads(path.read_text()), **json.loads(content)})
    path.write_text(content)
    forge(run / "checkpoint-2")
    refused(run, file)


@pytest.mark.parametrize("entry", [{"files": {"a": 5}}, {"files": {"a": {}}}, {"files": []}, {"engine": 5}], ids=str)
def test_a_manifest_of_a_wrong_form_is_passed_over(entry, run):
    file = run / "checkpoint-2" / MANIFEST
    file.write_text(json.dumps({"files": {}, **entry}))
    assert defects(file.parent) == ["manifest.json is missing or unreadable"]
    assert last_valid(run).name == "checkpoint-1"


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_in_full_fine_tuning(tmp_path):
    run = tmp_path / "run"
    tiny_trainer(run, lora=None, **SAVING).train()
    pipeline = tiny_pipeline(blocks=3)
    refused(run, "weights that differ, e.g. .* in .*model.safetensors", lora=None, pipeline=pipeline)


def refused_as_adapter(run: Path, match: str, change) -> None:
    """Evaluating the checkpoint whose adapter `change` has spoilt raises `match`."""
    change(run / "checkpoint-2" / LORA_FILE)
    with pytest.raises(ValueError, match=match), adapted(SD3Policy(tiny_pipeline()), run / "checkpoint-2"):
        pass


@pytest.mark.parametrize("harm", mostly_slow(["cut", "flipped_header", "pickle", "empty", "text"], "pickle"))
def test_a_broken_adapter_is_refused(harm, run, tmp_path):
    sign = tmp_path / "sign"
    spoilt = {
        "cut": lambda content: content[: len(content) // 2],
        "flipped_header": lambda content: bytes([content[0] ^ 255]) + content[1:],
        "pickle": lambda content: pickle.dumps(Malicious(sign)),
        "empty": lambda content: b"",
        "text": lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    }[harm]
    message = f"must be a safetensors file. Found .*{LORA_FILE}"
    refused_as_adapter(run, message, lambda file: file.write_bytes(spoilt(file.read_bytes())))
    assert not sign.exists()


def test_an_adapter_of_another_model_is_refused(run):
    def double(file):
        save_file({name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in load_file(file).items()}, file)

    refused_as_adapter(run, "adapter must have weights of this .*Found .*another model", double)
