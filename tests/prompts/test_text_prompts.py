"""Prompts that quote the text they ask for."""

import re

import pytest

from trl_apex.prompts.datasets import PLACES, STYLES, WORDS, text_prompts


def test_prompts_are_different_seeded_and_quote_their_target():
    drawn = text_prompts(200, seed=3)
    assert len(set(drawn["prompt"])) == 200
    for row in drawn:
        assert re.findall('"([^"]*)"', row["prompt"]) == [row["target"]]
        assert len(row["target"].split()) == row["words"] <= 3
        assert {word.lower() for word in row["target"].split()} <= set(WORDS)
    assert text_prompts(200, seed=3)["prompt"][:] == drawn["prompt"][:]
    assert text_prompts(200, seed=4)["prompt"][:] != drawn["prompt"][:]
    assert set(drawn["words"]) == {1, 2, 3}
    assert len({place for place in PLACES for p in drawn["prompt"] if p.startswith(place.split('"')[0])}) > 10
    assert len(WORDS) == len(set(WORDS)) and len(STYLES) == len(set(STYLES))


def test_all_prompts_there_are_and_no_more():
    few = {"words": ["a1"], "templates": ['x "{text}"'], "max_words": 1}
    assert len(text_prompts(2, **few)) == 2  # lower and capital
    with pytest.raises(ValueError, match="Found 2 of 3"):
        text_prompts(3, **few)


@pytest.mark.parametrize("template", ["no text", "{text}", '"{text}" and "{text}"'])
def test_a_template_must_quote_its_text_once(template):
    with pytest.raises(ValueError, match="in double quotes, once"):
        text_prompts(1, templates=[template])


def test_words_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="between 1 and 1 words"):
        text_prompts(1, words=["a", "a"], max_words=2)
    with pytest.raises(ValueError, match="double quotes"):
        text_prompts(1, words=['a"b'], max_words=1)
