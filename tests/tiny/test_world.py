"""The shipped world: real classes, small files, room for rewards to rise, and rewards that order images as people would."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tools.tiny_world.measure import sample_images
from trl_apex.tiny.heldout import heldout_metrics
from trl_apex.tiny.prompts import words
from trl_apex.tiny.render import Scene, as_float, render, render_batch, sample_scenes
from trl_apex.tiny.world import PARTS, load_tiny_pipeline, weights_path


def _clean_scenes(n: int) -> list[Scene]:
    scenes = sample_scenes(words("test"), n, seed=11)
    return [replace(scene, blur=0.0, noise=0.0, text_opacity=1.0, shape_opacity=1.0) for scene in scenes]


def _score(reward: Any, scenes: list[Scene], prompts: list[str] | None = None) -> np.ndarray:
    prompts = prompts or [scene.prompt for scene in scenes]
    return np.asarray(reward(prompts=prompts, completions=as_float(render_batch(scenes))), dtype=np.float64)


def test_weights_fit_in_five_megabytes() -> None:
    files = [path for path in weights_path("pipeline").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000


def test_every_part_is_there_and_an_unknown_one_is_refused() -> None:
    assert all(weights_path(name).exists() for name in PARTS)
    with pytest.raises(ValueError, match="unet"):
        weights_path("unet")


def test_no_file_names_a_class_that_only_one_release_knows() -> None:
    for path in weights_path("pipeline").parent.rglob("*.json"):
        text = path.read_text()
        assert "TokenizersBackend" not in text and "ProcessorPil" not in text, path
        assert "_name_or_path" not in text, path


def test_the_pipeline_is_the_real_class(pipeline: Any) -> None:
    assert type(pipeline) is StableDiffusion3Pipeline
    assert pipeline.transformer.dtype == torch.float32
    assert load_tiny_pipeline(torch.bfloat16).transformer.dtype == torch.bfloat16


def test_sampling_is_seeded_and_prompted(pipeline: Any, rows: Any) -> None:
    prompts = rows["prompt"][:4]
    first, second = (sample_images(pipeline, prompts, seed=5) for _ in range(2))
    assert first.shape == (4, 3, 32, 32)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.1
    assert torch.equal(first, second)
    assert (first - sample_images(pipeline, prompts, seed=6)).abs().mean() > 0.02
    assert (first - sample_images(pipeline, prompts[::-1], seed=5)).abs().mean() > 0.02


def test_base_rewards_leave_room(rewards: dict[str, Any], rows: Any, base_images: torch.Tensor) -> None:
    assert 0.4 <= np.mean(rewards["ocr"](prompts=rows["prompt"][:], completions=base_images)) <= 0.75
    for name, best in (("deqa", 5.0), ("aesthetic", 10.0)):
        scores = np.asarray(rewards[name](prompts=rows["prompt"][:], completions=base_images))
        assert scores.mean() + 2 * scores.std() / len(scores) ** 0.5 < best
        assert scores.std() > 0.1


def test_base_images_show_what_was_asked(rows: Any, base_images: torch.Tensor) -> None:
    metrics = heldout_metrics(base_images, {name: rows[name][:] for name in ("word", "colour", "shape")})
    assert np.mean(metrics["attributes"]) > 0.8
    assert 0.1 < np.mean(metrics["exact_word"]) < 0.95


def test_ocr_reads_clean_pictures(rewards: dict[str, Any]) -> None:
    assert _score(rewards["ocr"], _clean_scenes(24)).mean() > 0.95


def test_heldout_classifiers_agree_with_clean_pictures() -> None:
    scenes = _clean_scenes(96)
    columns = {name: [getattr(scene, name) for scene in scenes] for name in ("word", "colour", "shape")}
    metrics = heldout_metrics([render(scene) for scene in scenes], columns)
    assert np.mean(metrics["exact_word"]) > 0.9
    assert np.mean(metrics["attributes"]) > 0.9
    wrong = dict(columns, word=columns["word"][1:] + columns["word"][:1])
    assert np.mean(heldout_metrics([render(scene) for scene in scenes], wrong)["exact_word"]) < 0.1


def test_heldout_metrics_name_a_missing_column() -> None:
    with pytest.raises(ValueError, match="'shape'"):
        heldout_metrics([render(Scene("CAT", "red", "circle"))], {"word": ["CAT"], "colour": ["red"]})


@pytest.mark.parametrize("name", ["deqa", "aesthetic"])
@pytest.mark.parametrize("change", [{"blur": 1.0}, {"text_opacity": 0.3, "shape_opacity": 0.3}])
def test_degraded_pictures_score_lower(rewards: dict[str, Any], name: str, change: dict) -> None:
    clean = _clean_scenes(48)
    degraded = [replace(scene, **change) for scene in clean]
    higher = _score(rewards[name], clean) > _score(rewards[name], degraded)
    assert higher.mean() > 0.9


@pytest.mark.parametrize(
    ("change", "share"),
    [(("colour",), 0.95), (("shape",), 0.9), (("word", "colour", "shape"), 0.95)],
)
def test_pickscore_prefers_the_right_caption(rewards: dict[str, Any], change: tuple, share: float) -> None:
    scenes = _clean_scenes(64)
    others = scenes[1:] + scenes[:1]
    pairs = [
        (scene, replace(scene, **{key: getattr(other, key) for key in change}))
        for scene, other in zip(scenes, others, strict=True)
    ]
    pairs = [(scene, other) for scene, other in pairs if scene.prompt != other.prompt]
    matching = [scene for scene, _ in pairs]
    right = _score(rewards["pickscore"], matching)
    wrong = _score(rewards["pickscore"], matching, [other.prompt for _, other in pairs])
    assert (right > wrong).mean() > share


def test_rewards_take_pil_images_and_tensors_alike(rewards: dict[str, Any]) -> None:
    scenes = _clean_scenes(6)
    prompts = [scene.prompt for scene in scenes]
    for reward in rewards.values():
        np.testing.assert_allclose(
            reward(prompts=prompts, completions=[render(scene) for scene in scenes]), _score(reward, scenes), atol=1e-5
        )
