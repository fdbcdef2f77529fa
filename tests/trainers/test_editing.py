"""Models that edit an image: the source beside the prompt, from the dataset to the rewards."""

import adapter_trainers
import numpy as np
import pytest
import torch
from adapter_trainers import build, distance, longest, redness, sources
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from test_saved_weights import evaluated, plain
from tiny_runs import history, weights_of

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.evaluation.run import run_evaluation
from trl_apex.prompts.datasets import Edit, edits_of

EDITS = Dataset.from_dict({"prompt": ['a red circle with "CAT"', 'a blue star with "HUT"'], "source_image": sources()})
FAMILIES = ["flux-kontext", "qwen-image-edit"]


def make(name, output_dir, **options):
    values = {"height": 32, "width": 32, "dataset": EDITS, "max_sequence_length": longest(name), **options}
    return adapter_trainers.make(build(name), output_dir, **values)


def kept(images, source_image, **columns):
    """How near an image is to its source, whole, and that rewards get the user's own images."""
    size = images.shape[3], images.shape[2]
    before = np.stack([np.asarray(image.resize(size)) for image in source_image]) / 255
    after = images.permute(0, 2, 3, 1).numpy()
    return (-np.abs(before - after).mean((1, 2, 3))).tolist()


@pytest.fixture
def lora():
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights="gaussian")


@pytest.mark.parametrize("loss_type", ["grpo", "nft"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_starts_on_policy_and_plain_diffusers_draws_its_edits(name, loss_type, lora, tmp_path):
    guided = {"beta": 0.01, "guidance_scale": 3.0, "eval_guidance_scale": 1.0}
    options = {"timesteps_per_image": 2} if loss_type == "nft" else guided
    rewards = [kept, redness]
    trainer = make(name, tmp_path, peft_config=lora, rewards=rewards, loss_type=loss_type, max_steps=2, **options)
    start, images = weights_of(trainer), evaluated(trainer)
    trainer.train()
    assert any(not torch.equal(start[key], value) for key, value in weights_of(trainer).items())
    assert max(history(trainer, "ratio/first_update_deviation")) == 0
    assert -1 < history(trainer, "rewards/kept/mean")[0] < 0
    assert distance(evaluated(trainer), images) > 1e-4
    trainer.save_model()
    assert distance(plain(tmp_path, trainer, name), evaluated(trainer)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_source_decides_what_is_drawn_and_may_be_a_path_or_lie_in_the_cache(name, tmp_path):
    files = [tmp_path / f"{row}.png" for row in range(2)]
    for image, file in zip(sources(), files, strict=True):
        image.save(file)
    paths = Dataset.from_dict({"prompt": EDITS["prompt"][:], "source_image": [str(file) for file in files]})
    swapped = Dataset.from_dict({"prompt": EDITS["prompt"][:], "source_image": sources()[::-1]})
    images = evaluated(make(name, tmp_path))
    assert distance(evaluated(make(name, tmp_path, dataset=swapped)), images) > 1e-4
    cached = {"prompt_cache_dir": str(tmp_path / "cache"), "unload_text_encoders": True}
    for _ in range(2):
        trainer = make(name, tmp_path, dataset=paths, **cached)
        assert torch.equal(evaluated(trainer), images)
    (shard,) = (tmp_path / "cache").glob("*/*.safetensors")
    with pytest.raises(ValueError, match="text encoders were unloaded.*Found another prompt: 'a red circle"):
        trainer.evaluate(swapped)


def test_one_instruction_for_two_images_is_two_prompts(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a red star"] * 2, "source_image": sources()})
    trainer = make("flux-kontext", tmp_path, dataset=rows)
    assert [type(key) for key in trainer._conditions._rows] == [str, str]  # an `Edit` would hold its image in memory
    results = run_evaluation(
        build("flux-kontext"), {}, rows, [kept], tmp_path / "out", num_inference_steps=1, height=16, width=16,
        max_sequence_length=12, images_per_prompt=2, report=lambda line: None,
    )  # fmt: skip
    assert results["models"]["base"]["kept"]["n"] == 2


def test_images_are_seen_at_the_size_of_the_run_and_rewarded_as_they_are(tmp_path):
    large, seen = [image.resize((40, 24)) for image in sources()], []

    def sizes(images, source_image, **columns):
        seen.extend(image.size for image in source_image)
        return [0.0] * len(images)

    columns = {"height": [16, 16], "width": [16, 24]}
    rows = Dataset.from_dict({"prompt": EDITS["prompt"][:], "source_image": large, **columns})
    trainer = make("flux-kontext", tmp_path, dataset=rows, rewards=[sizes], height=None, width=None, num_generations=4)
    trainer.train()
    assert len(seen) == 4 + 2 and set(seen) == {(40, 24)}  # a rollout of one size, and an evaluation of both
    sizes = [(16, 16), (16, 24)]
    (edit, wide), (own, _) = edits_of(rows, sizes), edits_of([{**row} for row in rows], sizes)
    assert edit.image.size == (16, 16) and wide.image.size == (24, 16) and edit == own and hash(edit) == hash(own)
    assert trainer._conditions([edit])["source"].shape == (1, 4, 8, 8)
    transparent = Image.new("LA", (3, 3))
    assert edits_of([{"prompt": "a", "source_image": transparent}], [(2, 2)])[0].image.mode == "RGB"


def test_images_of_the_dataset_are_decoded_once_an_iteration(tmp_path, monkeypatch):
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer, decoded = make("flux-kontext", tmp_path, **small), []
    decode = ImageFeature.decode_example
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *given, **kw: decoded.append(1) or decode(*given, **kw))
    batches = list(trainer.get_train_dataloader())
    assert len(batches) >= 4 and {len(batch) for batch in batches} == {4} and not decoded
    trainer.train()
    assert 4 <= len(decoded) < 3 * 4  # and few more, for the evaluation; not four for each of four micro-batches
    assert trainer.train_dataset[0]["source_image"].size == (32, 32)
    changed = EDITS.with_transform(lambda rows: rows | {"added": [image.size for image in rows["source_image"]]})
    seen = []
    reward = lambda images, **columns: seen.extend(columns["added"]) or [0.0] * len(images)  # noqa: E731
    make("flux-kontext", tmp_path, dataset=changed, rewards=[reward]).train()
    assert set(seen) == {(32, 32)}


def test_the_probe_measures_the_objectives_of_an_edit(lora, tmp_path):
    args = APEXConfig(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, num_generations=2, max_steps=1,
        num_inference_steps=2, height=16, width=16, max_sequence_length=12, gradient_probe=True, probe_every=1,
        save_strategy="no", disable_tqdm=True, logging_steps=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer = APEXTrainer(build("flux-kontext"), [kept, redness], args, EDITS, peft_config=lora)
    trainer.train()
    assert len(history(trainer, "gradient_harmony")) == 1


@pytest.mark.parametrize(
    "column, message",
    [
        (None, r"needs the column `source_image` in `train_dataset`.*Found columns \['prompt'\]"),
        (
            [sources()[0], None],
            "must be an image, or the path of one, in every row of `train_dataset`. Found None in row 1",
        ),
        (["missing.png"] * 2, "Found 'missing.png' in row 0: .*No such file"),
        ([1, 2], "Found 1 in row 0"),
    ],
)
def test_a_dataset_without_images_is_refused_before_training(column, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = {} if column is None else {"source_image": column}
    rows = Dataset.from_dict({"prompt": EDITS["prompt"][:], **columns})
    with pytest.raises(ValueError, match=message):
        make("flux-kontext", tmp_path, dataset=rows)
    trainer = make("flux-kontext", tmp_path)
    with pytest.raises(ValueError, match=message.replace("train_dataset", "eval_dataset")):
        trainer.evaluate(rows)


def test_an_instruction_that_leaves_no_room_for_its_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold an instruction and its image. Found 23 tokens for 'a .*' and 12"):
        make("qwen-image-edit", tmp_path, max_sequence_length=12)


def test_an_edit_is_told_from_every_other():
    def white():
        return Image.new("RGB", (2, 2), "white")

    edit = Edit("make it red", white)
    assert edit == Edit("make it red", white) and edit != Edit("make it red", white, "blurred")
    assert edit != Edit("make it blue", white) and edit != Edit("make it red", lambda: Image.new("RGB", (2, 2)))
