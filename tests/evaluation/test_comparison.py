"""The summary of an evaluation."""

import json
import math

import pytest
import torch

from trl_apex.evaluation import compare, joint_hypervolume

NAMES = ["ocr", "score", "faces"]


def test_gains_domination_and_hypervolume_by_hand():
    base = torch.tensor([[0.0, 10.0, 1.0], [1.0, 20.0, 2.0], [0.0, 30.0, 3.0]])
    tuned = base + torch.tensor([[1.0, 10.0, 0.0], [0.0, 0.0, -1.0], [1.0, 5.0, -1.0]])
    result = compare(NAMES, base, tuned, objectives=2)
    assert list(result["objectives"]) == ["ocr", "score"] and list(result["held_out"]) == ["faces"]
    ocr = result["objectives"]["ocr"]
    assert ocr["base"] == pytest.approx(1 / 3) and ocr["tuned"] == pytest.approx(1.0)
    assert ocr["se"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3)) and ocr["n"] == 3
    gains = [result["objectives"][name]["gain"] for name in NAMES[:2]]
    assert gains == pytest.approx([(2 / 3) / math.sqrt(1 / 3), 0.5])
    assert result["hypervolume"] == pytest.approx(gains[0] * gains[1])
    assert result["domination"] == {"all_at_least_as_good": pytest.approx(2 / 3), "all_at_most_as_good": 0.0}
    assert result["held_out"]["faces"]["gain"] == pytest.approx(-2 / 3)


def test_a_reward_that_never_applied_is_none_and_valid_json():
    base, tuned = torch.rand(3, 2), torch.rand(3, 2)
    base[:2, 0] = torch.nan
    result = compare(["ocr", "constant"], base, tuned)
    assert result["objectives"]["ocr"] == {
        "base": None, "tuned": None, "se": None, "gain": None, "gain_se": None, "n": 1
    }  # fmt: skip
    assert result["hypervolume"] is None
    base[:, 1] = 1.0
    assert compare(["ocr", "constant"], base, tuned)["objectives"]["constant"]["gain"] is None
    json.dumps(result, allow_nan=False)


def test_prompts_without_any_score_do_not_count_as_equal():
    base = torch.tensor([[0.0, 1.0], [math.nan, math.nan], [0.0, math.nan]])
    result = compare(["ocr", "score"], base, base + 1)
    assert result["domination"] == {"all_at_least_as_good": 1.0, "all_at_most_as_good": 0.0}
    nothing = compare(["ocr", "score"], torch.full((2, 2), math.nan), torch.zeros(2, 2))
    assert nothing["domination"] == {"all_at_least_as_good": None, "all_at_most_as_good": None}


def test_two_models_together_dominate_more_than_either():
    first, second = {"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}
    assert [joint_hypervolume([g]) for g in (first, second)] == [2.0, 2.0]
    assert joint_hypervolume([first, second]) == 3.0
    assert joint_hypervolume([{"a": -1.0, "b": 5.0}]) == 0.0
    assert joint_hypervolume([]) is None
