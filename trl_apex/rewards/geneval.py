"""GenEval: whether the objects that a prompt asks for are in the image, found by an instance segmenter of transformers."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch.nn.functional import normalize

from trl_apex.rewards.base import Images, Reward, to_pil
from trl_apex.rewards.clip import CLIP_L, CLIPTower, shared_tower

SEGMENTER = "facebook/mask2former-swin-small-coco-instance"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CAPTIONS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's, GenEval's


class GenEvalReward(Reward):
    """GenEval's check of count, colour and position: 1 if the image has everything that its row asks for, else 0.

    A row of the column `objects` is one of GenEval's `evaluation_metadata.jsonl`, such as `{"tag": "position", "include":
    [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}`, its JSON text, or a list of names.
    A prompt without one has no reward. The authors' segmenter is the same network, Mask2Former, with weights of mmdet's.

    Args:
        model (`str`, *optional*): Hub id or local folder of an instance segmenter.
        clip (`str`, *optional*): Hub id or local folder of the `CLIPModel` that names colours.
        share (`bool`, *optional*, defaults to `False`): Return the share of the row's requirements that are met instead.
        options: See [`Reward`].

    Reference:
        Ghosh et al., GenEval, arXiv 2310.11513.
    """

    default_name = "geneval"
    range = "0 or 1, with `share` 0 to 1, larger is better"
    extra = "geneval"
    weights_licence = "MIT (Mask2Former's code, CLIP); see the segmenter's own card"

    column = "objects"
    threshold, counting_threshold = 0.3, 0.9  # the least score of an instance; the second where `tag` is "counting"

    def __init__(self, model: str = SEGMENTER, clip: str = CLIP_L, share: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.model, self.clip, self.share = model, clip, share

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
            if isinstance(row, list):
                row = {"include": [{"class": name, "count": count} for name, count in Counter(row).items()]}
            colours_of = functools.partial(colours, loaded[2], picture)
            met = requirements_met(self._masks(loaded, picture, row), row, colours_of) if row else []
            rewards.append((sum(met) / len(met) if self.share else float(all(met))) if met else None)
        return rewards

    def _masks(self, loaded: Any, picture: Image.Image, row: Mapping) -> dict[str, list[Image.Image]]:
        """The masks of the instances of each class, those with the highest scores first."""
        model, processor, _ = loaded
        asked = {wanted["class"] for part in ("include", "exclude") for wanted in row.get(part) or []}
        names = {label: NAMES.get(name, name) for label, name in model.config.id2label.items()}
        if unknown := sorted(asked.difference(names.values())):
            raise ValueError(
                f"`{self.column}` must name classes of {self.model}. Found {unknown}. Check the spelling."
            )
        inputs = processor(picture, return_tensors="pt").to(self.device)  # alone: padding would move the masks
        found = processor.post_process_instance_segmentation(
            model(pixel_values=inputs["pixel_values"].to(self.dtype), pixel_mask=inputs["pixel_mask"]),
            threshold=self.counting_threshold if row.get("tag") == "counting" else self.threshold,
            target_sizes=[picture.size[::-1]],
            return_binary_maps=True,
        )[0]
        masks: dict[str, list[Image.Image]] = {name: [] for name in names.values()}
        for segment in sorted(found["segments_info"], key=lambda segment: -segment["score"]):
            mask = found["segmentation"][segment["id"]].bool().cpu().numpy()
            masks[names[segment["label_id"]]].append(Image.fromarray(mask))
        return masks


def requirements_met(masks: Mapping[str, list[Image.Image]], row: Mapping, colours_of: Callable) -> list[bool]:
    """Whether an image meets each requirement of a row, first those of `include`, then those of `exclude`.

    The n instances of a class with the highest scores, which come first, must have the colour, and each must stand in the
    relation to each instance of the earlier requirement whose index `position` holds. `exclude` wants fewer than n.
    `colours_of` takes instances and their class, and returns a colour each.
    """
    met: list[bool] = []
    groups: list[list[Image.Image]] = []  # empty where the requirement is not met
    for wanted in row.get("include") or []:
        count = wanted["count"]
        found = masks.get(wanted["class"], [])[:count]
        ok = len(found) == count
        if ok and wanted.get("color"):
            ok = colours_of(found, wanted["class"]).count(wanted["color"]) == count
        if ok and wanted.get("position"):
            relation, index = wanted["position"]
            target = groups[int(index)]
            ok = bool(target) and all(relation in relations(a, b) for a in found for b in target)
        met.append(ok)
        groups.append(found if ok else [])
    return met + [len(masks.get(bad["class"], [])) < bad["count"] for bad in row.get("exclude") or []]


def relations(a: Image.Image, b: Image.Image) -> set[str]:
    """Where the box of mask `a` is to that of `b`: of "left of", "right of", "above" and "below" none, one or two.

    `v = sign(o) max(|o| - 0.1 (s_a + s_b), 0) / ||o||`, o the offset of the centres, s the sizes; a part of v beyond 0.5 counts.
    """
    first, second = np.reshape([a.getbbox(), b.getbbox()], (2, 2, 2))
    offset = first.mean(0) - second.mean(0)
    beyond = np.maximum(np.abs(offset) - 0.1 * (np.ptp(first, 0) + np.ptp(second, 0)), 0) * np.sign(offset)
    x, y = beyond / max(float(np.linalg.norm(offset)), 1e-3)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in held.items() if holds}


def colours(tower: CLIPTower, picture: Image.Image, masks: list[Image.Image], name: str) -> list[str]:
    """The colour of each instance: that of the captions whose mean is closest to its cut-out on grey, by CLIP."""
    texts = [caption.format(colour=colour, name=name) for colour in COLOURS for caption in CAPTIONS]
    captions = normalize(tower.encode_prompts(texts).unflatten(0, (len(COLOURS), len(CAPTIONS))).mean(1))
    grey = Image.new("RGB", picture.size, "#999")
    cut = [Image.composite(picture, grey, mask).crop(mask.getbbox()) for mask in masks]
    return [COLOURS[i] for i in (tower.encode_images(cut) @ captions.T).argmax(-1).tolist()]
