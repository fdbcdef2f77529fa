"""PNG figures and the image grid."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trl_apex.report import image_grid, write_figures


def test_figures_are_pictures(complete_run: Path) -> None:
    paths = write_figures(complete_run)
    assert [p.name for p in paths] == ["rewards.png", "priorities.png", "samples.png"]
    for path in paths:
        with Image.open(path) as image:
            colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        if path.stem != "samples":  # each objective has a curve in its own colour
            assert {(36, 99, 201), (196, 80, 27), (20, 128, 94), (138, 63, 179)} <= colours, path.name
    with Image.open(paths[2]) as image:
        assert image.size == (6 * 164 - 4, 2 * 164 - 4)  # base above tuned


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
