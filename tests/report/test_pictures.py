"""PNG figures, the image grid, and the trend with its band."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trl_apex.report import image_grid, write_figures
from trl_apex.report.smooth import trend


def test_figures_are_pictures(complete_run: Path) -> None:
    paths = write_figures(complete_run)
    assert [p.name for p in paths] == ["rewards.png", "priorities.png", "samples.png"]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    state = {"log_history": [{"step": 1, "rewards/ocr/mean": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert [p.name for p in write_figures(tmp_path)] == ["rewards.png"]


def test_grid_puts_images_in_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = image_grid([Image.new("RGB", (4, 4), c) for c in colours], columns=2, gap=2)
    assert grid.size == (10, 10)
    assert [grid.getpixel(p) for p in ((1, 1), (7, 1), (1, 7), (7, 7))] == [*colours, (255, 255, 255)]
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([], 2)


def test_the_band_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = np.linspace(0, 1, 200)
    inside = []
    for _ in range(40):
        mean, error = (np.array(v) for v in trend((truth + rng.normal(0, 0.3, 200)).tolist()))
        inside.append((np.abs(mean - truth) < 2 * error)[20:-20].mean())
    assert 0.9 < np.mean(inside) < 0.99
