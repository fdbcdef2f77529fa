"""GenEval: whether the objects that a prompt asks for are in the image, found by an instance segmenter of transformers."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from trl_apex.rewards.base import Images, Reward, to_pil
from trl_apex.rewards.clip import CLIP_L, CLIPTower, shared_tower

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CAPTIONS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
MOST = 16  # instances of one class in one image
Box = Sequence[float | int]


class Instance(NamedTuple):
    """One object of an image: left, top, right, bottom in pixels, and its mask, of shape `[H, W]`."""

    box: Box
    mask: Any = None


class GenEvalReward(Reward):
    """GenEval's check of count, colour and position: 1 if the image has everything that its row asks for, else 0.

    A row of the column is a row of GenEval's `evaluation_metadata.jsonl`, or its JSON text, which datasets hold in any case:
    `{"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}`.
    A prompt without a row has no reward. The authors segment with mmdet's weights of the same network, Mask2Former.

    Args:
        model (`str`, *optional*): Hub id or local folder of an instance segmenter.
        clip (`str`, *optional*): Hub id or local folder of the `CLIPModel` that names colours.
        column (`str`, *optional*, defaults to `"objects"`): The column that holds the rows.
        threshold, counting_threshold (`float`, *optional*, default to `0.3`, `0.9`): The least score of an instance; the second
            is for rows whose `tag` is `"counting"`.
        share (`bool`, *optional*, defaults to `False`): Return the share of the row's requirements that are met instead.
        name, device, dtype, batch_size: See [`Reward`].

    Reference:
        Ghosh et al., GenEval, arXiv 2310.11513.
    """

    default_name = "geneval"
    range = "0 or 1, with `share` 0 to 1, larger is better"
    weights_licence = "MIT (Mask2Former's code and weights, CLIP)"

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = CLIP_L,
        column: str = "objects",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        share: bool = False,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(name, device, dtype, batch_size)
        self.model, self.clip, self.column, self.share = model, clip, column, share
        self.threshold, self.counting_threshold = threshold, counting_threshold

    def _load(self) -> tuple[Any, Any, CLIPTower]:
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        processor = AutoImageProcessor.from_pretrained(self.model, backend="pil")
        model: Any = AutoModelForUniversalSegmentation.from_pretrained(self.model, dtype=self.dtype)
        model.to(self.device).eval().requires_grad_(False)
        return model, processor, shared_tower(self.clip, None, self.device, self.dtype)

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        rewards: list[float | None] = []
        for picture, row in zip(to_pil(images), columns.get(self.column) or [None] * len(prompts), strict=True):
            row = json.loads(row) if isinstance(row, str) else row
            if row is None:
                rewards.append(None)
                continue
            met = requirements_met(
                self._instances(loaded, picture, row),
                row,
                lambda *given, seen=picture: colours(loaded[2], seen, *given),
            )
            rewards.append(sum(met) / len(met) if self.share else float(all(met)))
        return rewards

    def _instances(self, loaded: Any, picture: Image.Image, row: Mapping) -> dict[str, list[Instance]]:
        """The instances of each class that the row names, those with the highest scores first."""
        model, processor, _ = loaded
        numbers = {COCO_NAMES.get(name, name): number for number, name in model.config.id2label.items()}
        names = {requirement["class"] for part in ("include", "exclude") for requirement in row.get(part) or []}
        if unknown := sorted(name for name in names if COCO_NAMES.get(name, name) not in numbers):
            raise ValueError(
                f"The classes of `{self.column}` must be among those of {self.model}. Found {unknown}. Check the spelling."
            )
        threshold = self.counting_threshold if row.get("tag") == "counting" else self.threshold
        inputs = processor(picture, return_tensors="pt").to(self.device)  # alone: padding would move the masks
        outputs = model(pixel_values=inputs["pixel_values"].to(self.dtype), pixel_mask=inputs["pixel_mask"])
        found = processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[picture.size[::-1]], return_binary_maps=True
        )[0]
        order = sorted(found["segments_info"], key=lambda segment: -segment["score"])
        instances: dict[str, list[Instance]] = {}
        for name in names:
            ids = [segment["id"] for segment in order if segment["label_id"] == numbers[COCO_NAMES.get(name, name)]]
            masks = [found["segmentation"][i].bool().cpu().numpy() for i in ids[:MOST]]
            instances[name] = [Instance(box_of(mask), mask) for mask in masks]
        return instances


def requirements_met(
    objects: Mapping[str, list[Instance]],
    row: Mapping[str, Any],
    colours_of: Callable[[list[Instance], str], list[str]],
) -> list[bool]:
    """Whether the image meets each requirement of a row, first those of `include`, then those of `exclude`.

    Of a class with the count n, the n instances with the highest scores must have the colour, and must each stand in the
    relation to each instance of the earlier requirement that `position` names by its index. `exclude` wants fewer than n.

    Args:
        objects (`Mapping[str, list[Instance]]`): The instances found of each class, those with the highest scores first.
        row (`Mapping`): See [`GenEvalReward`].
        colours_of (`Callable`): Takes instances and their class; returns a colour each.

    Example:
        >>> objects = {"cat": [Instance((0, 0, 4, 4))], "dog": [Instance((8, 0, 12, 4))]}
        >>> dog = {"class": "dog", "count": 1, "position": ["right of", 0]}
        >>> requirements_met(objects, {"include": [{"class": "cat", "count": 1}, dog]}, lambda found, name: [])
        [True, True]
    """
    met: list[bool] = []
    groups: list[list[Instance]] = []  # empty where the requirement is not met
    for wanted in row.get("include") or []:
        count = wanted["count"]
        found = objects.get(wanted["class"], [])[:count]
        ok = len(found) == count
        if ok and wanted.get("color"):
            ok = colours_of(found, wanted["class"]).count(wanted["color"]) == count
        if ok and wanted.get("position"):
            relation, index = wanted["position"]
            target = groups[int(index)]
            ok = bool(target) and all(relation in relations(a.box, b.box) for a in found for b in target)
        met.append(ok)
        groups.append(found if ok else [])
    return met + [len(objects.get(bad["class"], [])) < bad["count"] for bad in row.get("exclude") or []]


def relations(a: Box, b: Box) -> set[str]:
    """Where box `a` is to box `b`: of "left of", "right of", "above" and "below" none, one or two.

    With the offset `o` of the centres and the sizes `s`, `v = sign(o) max(|o| - 0.1 (s_a + s_b), 0) / ||o||`; a component of
    `v` beyond 0.5 counts.

    Example:
        >>> relations((0, 0, 10, 10), (50, 0, 60, 10))
        {'left of'}
    """
    first, second = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    offset = first.mean(0) - second.mean(0)
    beyond = np.maximum(np.abs(offset) - 0.1 * (np.ptp(first, 0) + np.ptp(second, 0)), 0) * np.sign(offset)
    if np.abs(beyond).max() < 1e-3:
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in held.items() if holds}


def colours(tower: CLIPTower, picture: Image.Image, instances: list[Instance], name: str) -> list[str]:
    """The colour of each instance: that of the captions whose mean is closest to its cut-out on grey, by CLIP."""
    texts = [caption.format(colour=colour, name=name) for colour in COLOURS for caption in CAPTIONS]
    captions = normalize(tower.encode_prompts(texts).unflatten(0, (len(COLOURS), len(CAPTIONS))).mean(1))
    grey = Image.new("RGB", picture.size, "#999")
    cut = [Image.composite(picture, grey, Image.fromarray(item.mask)).crop(item.box) for item in instances]  # type: ignore[arg-type]
    return [COLOURS[i] for i in (tower.encode_images(cut) @ captions.T).argmax(-1).tolist()]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around a mask of shape `[H, W]`: left, top, right, bottom.

    Example:
        >>> box_of(np.array([[False, False, False], [False, True, True]]))
        (1, 1, 3, 2)
    """
    rows, columns = np.nonzero(mask)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
