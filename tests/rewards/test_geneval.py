"""GenEval's rules by hand, and the reward on a tiny random segmenter against its raw logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from trl_apex.rewards import GenEvalReward
from trl_apex.rewards.clip import shared_tower
from trl_apex.rewards.geneval import CAPTIONS, COLOURS, colours, relations, requirements_met

LABELS = {0: "cat", 1: "dog", 2: "mouse"}


def mask_of(left, top, right, bottom):
    mask = np.zeros((70, 70), bool)
    mask[top:bottom, left:right] = True
    return Image.fromarray(mask)


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        ((0, 20, 10, 30), {"left of"}),
        ((40, 20, 50, 30), {"right of"}),
        ((20, 0, 30, 10), {"above"}),
        ((20, 40, 30, 50), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),  # 18 of 28.3 on each axis: 0.64
        ((17, 20, 27, 30), set()),  # 3 beyond 2 leaves 1 of 3: 0.33
        ((15, 20, 25, 30), {"left of"}),  # 5 beyond 2 leaves 3 of 5: 0.6
        ((19, 19, 29, 29), set()),  # 1 on each axis is within 2
        ((20, 20, 30, 30), set()),
    ],
)
def test_relations_to_a_box_in_the_middle(a, expected):
    assert relations(mask_of(*a), mask_of(20, 20, 30, 30)) == expected


def at(x):
    return mask_of(x, 0, x + 10, 10)


def asked(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("objects", "row", "met"),
    [
        ({"cat": [at(0)]}, {"include": [asked("cat")]}, [True]),
        ({}, {"include": [asked("cat")]}, [False]),
        ({"cat": [at(0)] * 3}, {"include": [asked("cat", 2)], "exclude": [asked("cat", 3)]}, [True, False]),
        ({"cat": [at(0)] * 2}, {"include": [asked("cat", 2)], "exclude": [asked("cat", 3)]}, [True, True]),
        ({"cat": [at(0)] * 2}, {"include": [asked("cat", 3)]}, [False]),
        ({"cat": [at(0)]}, {"include": [asked("cat", color="red")]}, [True]),
        ({"cat": [at(50)]}, {"include": [asked("cat", color="red")]}, [False]),
        # Only the two with the highest scores count.
        ({"cat": [at(0), at(1), at(50)]}, {"include": [asked("cat", 2, color="red")]}, [True]),
        ({"cat": [at(0), at(50), at(1)]}, {"include": [asked("cat", 2, color="red")]}, [False]),
        (
            {"cat": [at(50)], "dog": [at(0)]},
            {"include": [asked("cat"), asked("dog", position=["left of", 0])]},
            [True, True],
        ),
        (
            {"cat": [at(0)], "dog": [at(50)]},
            {"include": [asked("cat"), asked("dog", position=["left of", 0])]},
            [True, False],
        ),
        ({"dog": [at(0)]}, {"include": [asked("cat"), asked("dog", position=["left of", 0])]}, [False, False]),
        # Columns of a dataset hold None where a row has no such key.
        ({"cat": [at(0)]}, {"include": [asked("cat", color=None, position=None)], "exclude": None}, [True]),
    ],
)
def test_requirements(objects, row, met):
    colours_of = lambda found, name: ["red" if item.getbbox()[0] < 50 else "blue" for item in found]  # noqa: E731
    assert requirements_met(objects, row, colours_of) == met


def test_colour_of_a_cut_out_on_grey(clip_folder):
    tower = shared_tower(str(clip_folder), None, torch.device("cpu"), torch.float32)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    mask = np.zeros((24, 24), bool)
    mask[4:20, 2:18] = True
    mask[4:8, 2:8] = False
    pixels = np.full((24, 24, 3), 0x99, np.uint8)
    pixels[mask] = np.asarray(picture)[mask]
    cut = Image.fromarray(pixels[4:20, 2:18])
    image = tower.encode_images([cut])[0]
    heads = []
    for colour in COLOURS:
        texts = tower.encode_prompts([caption.format(colour=colour, name="square") for caption in CAPTIONS])
        heads.append(texts.mean(0) / texts.mean(0).norm())
    expected = COLOURS[torch.stack([head @ image for head in heads]).argmax()]
    assert colours(tower, picture, [Image.fromarray(mask)], "square") == [expected]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12, id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 20  # otherwise all classes are equally likely
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def scores_by_hand(folder, picture):
    """The scores of each class's instances: class probability times the mean probability inside the mask."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    chances = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
    masks = torch.nn.functional.interpolate(outputs.masks_queries_logits, (384, 384), mode="bilinear")[0]
    best = chances.flatten().topk(12).indices
    found = {name: [] for name in LABELS.values()}
    for index in best.tolist():
        query, label = divmod(index, 3)
        inside = masks[query] > 0
        if inside.any():
            found[LABELS[label]].append((chances[query, label] * masks[query][inside].sigmoid().mean()).item())
    return found


@pytest.mark.parametrize("as_json", [True, False])
def test_counts_of_a_random_segmenter(folder, clip_folder, pictures, as_json):
    reward = GenEvalReward(str(folder), str(clip_folder), device="cpu")
    reward.threshold, reward.counting_threshold = 0.05, 0.2
    form = json.dumps if as_json else dict
    scores = [scores_by_hand(folder, picture) for picture in pictures]
    met = 0
    for name in ("cat", "dog", "computer mouse"):
        for count in (1, 2, 4):
            for tag, threshold in (("counting", 0.2), ("two_object", 0.05)):
                row = {"tag": tag, "include": [asked(name, count)]}
                own = [found[name.split()[-1]] for found in scores]
                expected = [float(sum(score >= threshold for score in found) >= count) for found in own]
                assert reward(prompts=["a", "b"], completions=pictures, objects=[form(row)] * 2) == expected
                met += sum(expected)
    assert 0 < met < 36


def test_two_prompts_two_rewards(folder, clip_folder, pictures):
    reward = GenEvalReward(str(folder), str(clip_folder), share=True, device="cpu")
    reward.threshold = 0.0
    most = {name: len(scores) for name, scores in scores_by_hand(folder, pictures[0]).items()}
    name = max(most, key=most.get)
    row = {"include": [asked(name), asked(name, 99)], "exclude": [asked(name, 99)]}
    assert reward(prompts=["a", "b"], completions=pictures, objects=[row, None]) == [pytest.approx(2 / 3), None]
    assert reward(prompts=["a", "b"], completions=pictures) == [None, None]
    names = [[name], [name] * 99 + ["cat"]]  # a list of names asks for as many of each
    assert reward(prompts=["a", "b"], completions=pictures, objects=names)[0] == 1
    assert reward(prompts=["a", "b"], completions=pictures, objects=names)[1] < 1


def test_a_class_that_the_segmenter_does_not_know(folder, clip_folder, pictures):
    reward = GenEvalReward(str(folder), str(clip_folder), device="cpu")
    with pytest.raises(ValueError, match=r"Found \['unicorn'\]"):
        reward(prompts=["a"], completions=pictures[:1], objects=[{"include": [asked("unicorn")]}])
