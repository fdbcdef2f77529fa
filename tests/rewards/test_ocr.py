"""The OCR rule, case by case, and the real reader on real pictures."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from trl_apex.rewards import OCRReward
from trl_apex.rewards.ocr import levenshtein, quoted_targets, text_similarity


@pytest.mark.parametrize(
    ("recognized", "target", "reward"),
    [
        ("Open", "Open", 1),
        ("OPEN", "open", 1),  # case
        ("o p e n", "open", 1),  # spaces in the image
        ("open", " O P E N ", 1),  # spaces in the target
        ("op\ten\n", "open", 1),  # other white space
        ("we are open today", "open", 1),  # contained
        ("reopened", "open", 1),  # contained without a border
        ("opn", "open", 3 / 4),  # one letter missing
        ("oppen", "open", 3 / 4),  # one too many, so not contained
        ("0pen", "open", 3 / 4),  # one wrong
        ("", "open", 0),  # nothing read
        ("x", "open", 0),
        ("a very long text without it", "open", 0),  # the distance is capped at the target's length
        ("ope", "open", 3 / 4),  # shorter
        ("openopne", "openopen", 6 / 8),
        ("你好", "你好", 1),  # not Latin
        ("你妤", "你好", 1 / 2),
        ("ПРИВЕТ", "привет", 1),
        ("STRASSE", "straße", 1 - 2 / 6),  # no folding of letters, only lower case
        ("café", "CAFE\u0301", 1),  # combining characters
        ("２０２４：ＡＢ", "2024: ab", 1),  # full-width
        ("ﬁne", "fine", 1),
        ("Don't", "Don\u2019t", 1),
        ("9-17", "9\u201317", 1),
        ("ab", "a\u200b\u00adb\u200f", 1),  # invisible characters
        ("\u2764", "\u2764\ufe0f", 1),
        ("\u0645\u0631\u062d\u0628\u0627", "\u200f\u0645\u0631\u062d\u0628\u0627", 1),
    ],
)
def test_rule(recognized, target, reward):
    assert text_similarity(recognized, target) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("prompt", "targets"),
    [
        ('a sign "Open"', ["Open"]),
        ('a sign "Open" and "24 h"', ["Open", "24 h"]),
        ("a sign \u201cOpen\u201d", ["Open"]),
        ("a red bird", []),
        ('a sign " " and ""', []),
        ('an odd " mark', []),
        ("a sign 'Open'", ["Open"]),
        ('with " C A T "', [" C A T "]),
        ('a 5" screen that says "HI 5" and "B"', ["HI 5", "B"]),  # inch marks
        ('ein Schild „Geöffnet“, „Mo-Fr", „do 9-17”', ["Geöffnet", "Mo-Fr", "do 9-17"]),
        ("une enseigne « Café » et «Bar», »Kino« ‹Ja›", ["Café", "Bar", "Kino", "Ja"]),
        ("看板「営業中」『本日』", ["営業中", "本日"]),
        ("看板〝営業中〟 ＂本日＂", ["営業中", "本日"]),
        ("en skylt ”Öppet”, ein Schild ‚Auf‘ ›Zu‹ »Mo»", ["Öppet", "Auf", "Zu", "Mo"]),
        ("\u05e9\u05dc\u05d8 \u201c\u05e9\u05dc\u05d5\u05dd\u201d", ["\u05e9\u05dc\u05d5\u05dd"]),
        ('a sign "\u200b"', []),
        ("a sign 'OPEN' and ‘It’s late’", ["OPEN", "It’s late"]),
        ("the dog's bowl says 'Don't touch'.", ["Don't touch"]),
        ("""a 'vintage' sign, "SALE\"""", ["SALE"]),  # single quotes count if there are no others
        ("rock 'n' roll of the '90s, the girls' club", []),
        ('a 24" x 36" poster "SALE" and a 5\' wall', ["SALE"]),
    ],
)
def test_targets(prompt, targets):
    assert quoted_targets(prompt) == targets


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_levenshtein_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


def picture(text: str, side: int = 64, fill: str = "black") -> Image.Image:
    font = ImageFont.load_default(side // 4)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.text(((side - right - left) / 2, (side - bottom - top) / 2), text, fill=fill, font=font)
    return image


@pytest.fixture(scope="module")
def reward():
    reward = OCRReward(workers=1)
    yield reward
    reward.unload()


def test_reads_pictures(reward):
    images = [picture("HELLO", 128), picture("HELLO", 128), picture("", 128), picture("CAT", 32), picture("CAT", 32)]
    prompts = ['sign "hello"', 'sign "hullo"', 'sign "hello"', 'with " C A T "', "no text asked for"]
    assert reward(prompts=prompts, completions=images) == [1.0, pytest.approx(4 / 5), 0.0, 1.0, None]


def test_tensors_and_pictures_agree(reward):
    images = [picture("CAT"), picture("TEN", fill="gray")]
    tensor = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    prompts = ['"cat"', '"tea"']
    expected = reward(prompts=prompts, completions=images)
    assert reward(prompts=prompts, completions=images, images=tensor) == expected
    assert reward(prompts=prompts, completions=tensor) == expected


def test_target_columns(reward):
    images, prompts = [picture("CAT")] * 3, ['"dog"'] * 3
    assert reward(prompts=prompts, completions=images, target=["cat", None, ""]) == [1.0, None, None]
    assert reward(prompts=prompts, completions=images, text=["cat", "cat", "cat"]) == [1.0] * 3
    named = OCRReward(target_column="word", workers=1)
    assert named(prompts=prompts, completions=images, word=["cat"] * 3, target=["x"] * 3) == [1.0] * 3
    with pytest.raises(ValueError, match="`target_column` must be a column"):
        named(prompts=prompts, completions=images)


def test_a_line_is_read_from_left_to_right_where_its_right_half_stands_higher(reward):
    image, font = Image.new("RGB", (320, 128), "white"), ImageFont.load_default(32)
    draw = ImageDraw.Draw(image)
    for text, place in (("LEFT", (20, 32)), ("RIGHT", (180, 20)), ("BELOW", (90, 80))):
        draw.text(place, text, fill="black", font=font)
    assert reward(prompts=['"left right below"'], completions=[image]) == [1.0]


def test_targets_that_are_numbers_or_lists(reward):
    images, prompts = [picture("2024", 128)] * 7, ['"2024" and "xxxx"'] * 7
    targets = [2024, 2024.0, ["2024"], ["2024", "xxxx"], None, float("nan"), []]
    assert reward(prompts=prompts, completions=images, target=targets) == [1.0] * 4 + [None] * 3
    mean = OCRReward(workers=1, several="mean")
    for columns in ({"target": [["2024", "xxxx"]]}, {}):  # of the column, else of the prompt
        assert mean(prompts=prompts[:1], completions=images[:1], **columns) == [0.5]
    mean.unload()


def test_pickle_and_unload(reward):
    copy = pickle.loads(pickle.dumps(reward))
    for _ in range(2):
        assert copy(prompts=['"cat"'], completions=[picture("CAT")]) == [1.0]
        copy.unload()


def test_engine_settings_reach_the_engine(reward):
    narrow = OCRReward(workers=1, confidence=True, engine_params={"Rec.rec_img_shape": [3, 48, 96]})
    wide = OCRReward(workers=1, confidence=True)
    images, prompts = [picture("CAT"), picture("TEN")], ['"cat"', '"ten"']
    read, usual = (one(prompts=prompts, completions=images) for one in (narrow, wide))
    assert read == pytest.approx(usual, abs=0.05) and read != usual  # padding changes the confidence a little
    unreadable = OCRReward(workers=1, engine_params={"Global.text_score": 1.0})  # keeps nothing below full confidence
    assert unreadable(prompts=prompts, completions=images) == [0.0, 0.0]
    for one in (narrow, wide, unreadable):
        one.unload()


@pytest.mark.slow
def test_processes_read_as_threads_do(reward):
    images = [picture(word) for word in ("CAT", "TEN", "HAT", "OAK")]
    prompts = ['"cat"', '"ten"', '"hut"', '"elk"']
    pooled = OCRReward(workers=2, pool="process")
    assert pooled(prompts=prompts, completions=images) == reward(prompts=prompts, completions=images)
    for process in pooled._loaded._processes.values():  # as the kernel does where memory is short
        process.kill()
        process.join()
    assert pooled(prompts=prompts, completions=images) == reward(prompts=prompts, completions=images)
    pooled.unload()


@pytest.mark.parametrize("options", [{"several": "all"}, {"pool": "fork"}, {"workers": 0}, {"batch_size": 0}])
def test_options(options):
    with pytest.raises(ValueError, match="Found"):
        OCRReward(**options)
