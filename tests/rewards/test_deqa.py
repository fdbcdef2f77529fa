"""DeQA's arithmetic against a hand computation, and what it demands of a tokenizer."""

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import LEVELS, save_llava
from transformers import AutoProcessor, LlavaForConditionalGeneration

from trl_apex.rewards import DeQAReward, RewardLoadError, VLMYesReward
from trl_apex.rewards.deqa import build_text, level_score

QUESTION = "How would you rate the quality of this image?"
CHAT = (
    "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %} {% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def probabilities(folder, image, text, words):
    """Of the words after the text, from the full distribution."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(**processor(images=image, text=text, return_tensors="pt")).logits
    return logits[0, -1].double().softmax(-1)[processor.tokenizer.convert_tokens_to_ids(words)]


def by_hand(folder, images, text):
    """One image at a time: probabilities of the five words, renormalized."""
    chances = torch.stack([probabilities(folder, image, text, LEVELS) for image in images])
    return (chances / chances.sum(1, keepdim=True) @ torch.arange(5.0, 0, -1).double()).tolist()


def test_score_is_the_expected_level(llava_folder, images):
    text = f"USER: <image>\n{QUESTION}\nASSISTANT: The quality of the image is"
    reward = DeQAReward(str(llava_folder), batch_size=2)
    rewards = reward(prompts=["x"] * 3, completions=images)
    assert len(set(rewards)) == 3
    assert rewards == pytest.approx(by_hand(llava_folder, images, text), abs=1e-5)
    assert reward.load()[1].tokenizer.padding_side == "left", "padding keeps the answer at the end"


def test_chat_template(tmp_path, images):
    folder = save_llava(tmp_path, chat_template=CHAT)
    text = f"USER: <image> {QUESTION} ASSISTANT: The quality of the image is"
    reward = DeQAReward(str(folder))
    assert reward.load()[2] == text
    assert reward(prompts=["x"] * 3, completions=images) == pytest.approx(by_hand(folder, images, text), abs=1e-5)


def test_own_template(llava_folder, images):
    reward = DeQAReward(str(llava_folder), template="{image} {question} {answer}", question="quality ?", answer="is")
    expected = by_hand(llava_folder, images, "<image> quality ? is")
    assert reward(prompts=["x"] * 3, completions=images) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("logits", "score"),
    [([1e4, 0, 0, 0, 0], 5), ([0, 0, 0, 0, 1e4], 1), ([0] * 5, 3), ([-1e4, 7, 7, -1e4, -1e4], 3.5)],
)
def test_level_score(logits, score):
    assert level_score(torch.tensor([logits], dtype=torch.float32)).item() == pytest.approx(score)


def test_unknown_level_words_are_refused(tmp_path):
    folder = save_llava(tmp_path, levels=LEVELS[:4])
    with pytest.raises(RewardLoadError, match="one known token of its own.*'bad'"):
        DeQAReward(str(folder)).load()


@pytest.mark.parametrize("levels", [("excellent", "very good"), ("good", "good")])
def test_split_and_shared_level_words_are_refused(llava_folder, levels):
    with pytest.raises(RewardLoadError, match=f"'{levels[1]}'"):
        DeQAReward(str(llava_folder), levels=levels).load()


def test_a_start_token_is_not_doubled(tmp_path):
    folder = save_llava(tmp_path, chat_template="<s>" + CHAT, wrap=True)
    text = build_text(AutoProcessor.from_pretrained(folder), QUESTION, "is")
    assert text == f"USER: <image> {QUESTION} ASSISTANT: is"


def yes_by_hand(folder, image, text):
    return probabilities(folder, image, text, ["Yes"]).log().item()


@pytest.mark.parametrize("chat_template", [None, CHAT])
def test_log_probability_of_yes(tmp_path, images, chat_template):
    folder = save_llava(tmp_path, levels=["Yes", "cat", "dog"], chat_template=chat_template)
    around = "USER: <image>{}{{}}{}ASSISTANT:".format(*("  " if chat_template else "\n\n"))
    reward = VLMYesReward(str(folder), question="The {prompt} ?", device="cpu")
    expected = [
        yes_by_hand(folder, image, around.format(f"The {it} ?"))
        for image, it in zip(images, ["cat", "dog", "cat"], strict=True)
    ]
    rewards = reward(prompts=["cat", "dog", "cat"], completions=images)
    assert rewards == pytest.approx(expected, abs=1e-5) and len(set(rewards)) == 3

    asked = [["The cat ?", "How dog ?"], None, "this ?"]
    mean = sum(yes_by_hand(folder, images[0], around.format(question)) for question in asked[0]) / 2
    expected = [mean, expected[1], yes_by_hand(folder, images[2], around.format("this ?"))]
    assert reward(prompts=["cat", "dog", "cat"], completions=images, questions=asked) == pytest.approx(
        expected, abs=1e-5
    )
