"""The model card."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from trl_apex.trainers.publishing import CardFacts, refresh_model_card, write_model_card

OBJECTIVES = [{"name": "ocr", "weight": 2.0, "licence": "Apache-2.0"}, {"name": "deqa", "weight": 1.0, "licence": ""}]


def written(run_dir: Path, **facts) -> ModelCard:
    values = {"base_model": "org/base", "objectives": OBJECTIVES, **facts}
    return ModelCard.load(write_model_card(run_dir, CardFacts(**values), "me/apex"))


def test_metadata(run_dir: Path) -> None:
    data = written(run_dir).data
    assert data.base_model == "org/base" and data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {"trl", "apex", "grpo", "diffusers", "lora", "text-to-image"} <= set(data.tags)
    assert data.to_dict()["widget"] == [{"text": 'a cat | with "A"', "output": {"url": "samples/tuned_000.png"}}]


def test_what_a_reader_needs_is_there(run_dir: Path) -> None:
    text = written(run_dir).text
    for part in (
        'load_lora_weights("me/apex")',
        'from_pretrained("org/base"',
        "| ocr | 0.500 | 0.700 | +0.200 ± 0.020 | +0.800 |",
        "exact (never trained on)",
        "| ocr | 2.0 | Apache-2.0 |",
        "| deqa | 1.0 | see its model card |",
        "reconstructs it from the abstract",
        "for 4 optimizer steps",
        "torch 2.13.0",
        "arXiv:2601.06574",
        "arXiv:2505.05470",
        "seed: 3",
    ):
        assert part in text, part
    assert "run_name" not in text


def test_secrets_stay_out(run_dir: Path) -> None:
    assert "hf_secret" not in written(run_dir).content
    assert "hf_secret" not in (run_dir / "card.json").read_text()


def test_example_code_is_valid_python(run_dir: Path) -> None:
    for facts in ({}, {"adapter": False, "tags": ["trl", "lora"]}):
        card = written(run_dir, **facts)
        code = card.text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
    assert "AutoModel" in code and card.data.tags == ["trl"]
    card = written(run_dir, tags=["trl", "image-to-image"])
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "import load_image\n" in code and "image=source" in code and card.data.pipeline_tag == "image-to-image"


def test_static_rules_are_not_called_apex(run_dir: Path) -> None:
    text = written(run_dir, rule="sum_then_normalize").text
    assert "static rule `sum_then_normalize`" in text and "adapted during training" not in text


def test_a_local_base_model_is_no_hub_id(run_dir: Path, tmp_path: Path) -> None:
    card = written(run_dir, base_model=str(tmp_path / "my-pipeline"))
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content and "my-pipeline" in card.text


def test_a_refreshed_card_keeps_the_facts_and_takes_new_results(run_dir: Path) -> None:
    written(run_dir)
    (run_dir / "summary.json").write_text('{"objectives": {"ocr": {"base": 0.5, "tuned": 0.9, "se": 0.01}}}')
    text = ModelCard.load(refresh_model_card(run_dir, "me/other")).text
    assert "| ocr | 2.0 | Apache-2.0 |" in text and "+0.400 ± 0.010" in text and '"me/other"' in text


@pytest.mark.parametrize("name", ["summary.json", "config.json", "environment.json", "trainer_state.json", "samples"])
def test_any_part_may_be_missing(run_dir: Path, name: str) -> None:
    import shutil

    shutil.rmtree(run_dir / name) if name == "samples" else (run_dir / name).unlink()
    assert refresh_model_card(run_dir).is_file()
