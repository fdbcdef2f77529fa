"""Prompts that nobody thought of, from the dataset to an update."""

import warnings

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import contrast, history, redness, tiny_trainer

from trl_apex.prompts import load_prompts
from trl_apex.rewards.ocr import quoted_targets, text_similarity

NASTY = [
    "",
    " ",
    "a" * 10_000,
    "word " * 2_000,
    "quotes \" ' ` “ ” „ « » ‘ ’ 「 」 \"\" ''",
    'an open " quote',
    "日本語 العربية עברית हिन्दी 🦊👩‍👩‍👧 é ﷽",
    "\x00 \x07 \x1b[31m \r\n\t \u202e \ufeff \u200d",
    "%s %d {0} {prompt} ${HOME} \\n \\x00",
    "'; DROP TABLE prompts; -- <script>alert(1)</script> ../../etc/passwd",
    "<|endoftext|> [PAD] </s> <s>",
    "a red circle",
    "a red circle",
]


def seen(kept):
    def reward(prompts, images, **others):
        kept.extend(prompts)
        return redness(images)

    reward.__name__ = "redness"
    return reward


def train(folder, prompts, **overrides):
    kept: list[str] = []
    trainer = tiny_trainer(folder, (seen(kept), contrast), prompts=prompts, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert all(value == value for value in history(trainer, "loss"))
    return kept


def test_nasty_prompts_reach_the_rewards_as_they_are(tmp_path):
    kept = train(tmp_path, NASTY[:8], max_steps=4, shuffle_dataset=False)
    assert kept == [prompt for prompt in NASTY[:8] for _ in range(2)]


@pytest.mark.slow
def test_every_nasty_prompt(tmp_path, figure):
    kept = train(tmp_path, NASTY, max_steps=6, shuffle_dataset=False, prompt_cache_dir=str(tmp_path / "cache"))
    assert kept == [prompt for prompt in NASTY[:12] for _ in range(2)]
    figure("nasty_prompts", {"prompts": len(NASTY), "longest": max(map(len, NASTY)), "changed": 0})


@pytest.mark.slow
def test_one_prompt_and_many_duplicates(tmp_path):
    one_group = {"generation_batch_size": 2, "per_device_train_batch_size": 2}
    assert set(train(tmp_path / "one", ["a red circle"], max_steps=3, **one_group)) == {"a red circle"}
    assert set(train(tmp_path / "same", ["a red circle"] * 4, max_steps=3)) == {"a red circle"}
    with pytest.raises(ValueError, match="needs 2 prompts.*Found a dataset of 1"):
        tiny_trainer(tmp_path, prompts=["a red circle"])


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.text(), st.text())
def test_any_text_has_quoted_targets_and_a_similarity(prompt, read):
    for target in quoted_targets(prompt):
        assert isinstance(target, str)
        assert 0.0 <= text_similarity(read, target) <= 1.0


FILES = st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".parquet"])


def check_file(suffix, content, folder) -> bool:
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = load_prompts(path)
    except ValueError as error:
        assert str(path) in str(error) and "Found" in str(error), str(error)
        return True
    assert isinstance(dataset, Dataset) and all(isinstance(prompt, str) for prompt in dataset["prompt"])
    return False


CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "ignore")),
    st.sampled_from(
        [b"prompt\n", b"prompt\na cat\n", b'{"prompt": 3}\n', b'[{"prompt": null}]', b'{"prompt": "a"}\n{"prompt": ["b"]}\n',
         b'prompt,x\n"a,b\n', b"PAR1", b'[{"prompt": "a"}]']
    ),
)  # fmt: skip


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_files_of_random_content(count, tmp_path, figure):
    counts = {"tried": 0, "refused_by_name": 0}

    @settings(
        deadline=None, derandomize=True, database=None, max_examples=count, suppress_health_check=list(HealthCheck)
    )
    @given(FILES, CONTENTS)
    def each(suffix, content):
        counts["tried"] += 1
        counts["refused_by_name"] += check_file(suffix, content, tmp_path)

    each()
    figure("prompt_files", counts)
