"""Prompts: disjoint words, the same draw for the same seed, and tokenizers that survive saving."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trl_apex.tiny.pipeline import build_tokenizer
from trl_apex.tiny.prompts import caption, tiny_prompts, words


def test_prompts_are_seeded_and_different() -> None:
    first, second = tiny_prompts("train", 64, seed=1), tiny_prompts("train", 64, seed=1)
    assert first["prompt"][:] == second["prompt"][:]
    assert first["prompt"][:] != tiny_prompts("train", 64, seed=2)["prompt"][:]
    assert len(set(first["prompt"])) == 64
    assert all(row["prompt"] == caption(row["word"], row["colour"], row["shape"]) for row in first)
    assert set(tiny_prompts("test", 500)["word"]) <= set(words("test"))


@pytest.mark.parametrize(("split", "n"), [("validation", 4), ("train", 0), ("test", 10**6)])
def test_bad_requests_are_refused(split: str, n: int) -> None:
    with pytest.raises(ValueError, match="Found"):
        tiny_prompts(split, n)


@pytest.mark.parametrize("begin", [True, False])
def test_prompt_tokenizer_survives_saving(tmp_path: Path, begin: bool) -> None:
    tokenizer = build_tokenizer(begin=begin)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = 'a red circle with "CAT" unheard'
    assert loaded(prompt).input_ids == tokenizer(prompt).input_ids
    assert loaded.model_max_length == 12
    padded = loaded([prompt, ""], padding="max_length", max_length=12, truncation=True).input_ids
    assert [len(row) for row in padded] == [12, 12]
    assert loaded.unk_token_id in padded[0] and padded[1][-1] == loaded.pad_token_id


def test_every_prompt_is_known_to_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for prompt in tiny_prompts("train", 200)["prompt"]:
        assert tokenizer.unk_token_id not in tokenizer(prompt).input_ids
