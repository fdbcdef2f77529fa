"""Does the image show the text that the prompt quotes?"""

import re
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from trl_apex.rewards.base import Images, Reward, RewardLoadError, to_arrays

QUOTES = (
    r'(?<!\d)"([^"]*)"',  # a quote behind a digit is an inch mark
    "\u201c([^\u201d]*)\u201d",  # English
    "\u201d([^\u201c\u201d]*)\u201d",  # Swedish, Finnish
    '\u201e([^\u201e\u201c\u201d"]*)[\u201c\u201d"]',  # German, Polish
    "\u201a([^\u201a\u2018]*)\u2018",
    r"\u00ab\s*([^\u00bb]*?)\s*\u00bb|\u00bb([^\u00ab\u00bb]*)[\u00ab\u00bb]",  # angles
    "\u2039([^\u203a]*)\u203a|\u203a([^\u2039]*)\u2039",
    "\u300c([^\u300d]*)\u300d|\u300e([^\u300f]*)\u300f",  # Chinese, Japanese, Korean
)
QUOTED = re.compile("|".join(QUOTES))
# Single quotes start and end at a word's border, and are no decade ('90s) and no 'n' of rock 'n' roll.
SINGLE = re.compile(
    r"(?<!\w)['\u2018](?!\d\ds\b|n['\u2019])((?:[^'\u2018\u2019]|(?<=\w)['\u2019](?=\w))+)['\u2019](?!\w)"
)
# Full-width and East Asian forms of quotes, as the ones above; and typographic signs that a reader takes for plain ones.
PLAIN_QUOTES = str.maketrans("\uff02\uff07\u201f\u301d\u301e\u301f", "\"'\u201c\u201c\u201d\u201d")
PLAIN_SIGNS = str.maketrans(
    "\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "''\"\"------", "\ufe0e\ufe0f"
)
INVISIBLE = ("Cf", "Cc", "Cs")  # Unicode's categories: joiners, marks of direction, controls

# RapidOCR on one CPU thread, with the detector at the image's own size.
ENGINE = {
    "Global.log_level": "error",
    "Det.limit_side_len": 128,
    "Det.limit_type": "min",
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


class OCRReward(Reward):
    """How well the text in the image matches the text that the prompt quotes, read by PP-OCR through RapidOCR.

    `r = text_similarity(text in the image, target)`, 0 to 1; None for a prompt that asks for no text.

    Args:
        target_column (`str`, *optional*): Dataset column with the target: a text, a number, or a list of them. Defaults
            to the column `target`, else `text`, else the prompt's quoted text.
        several (`"first"` or `"mean"`, *optional*): Of several targets, score the first, as Flow-GRPO does, or take the mean.
        min_side (`int`, *optional*): Pixels of the shorter side to which smaller images are enlarged, to find small text.
        confidence (`bool`, *optional*, defaults to `False`): Multiply by the recognizer's confidence in [0, 1]. Short
            targets otherwise give few different values (four for three letters), and groups without a difference.
        workers (`int`, *optional*, defaults to `2`): Images read at the same time.
        pool (`"thread"` or `"process"`, *optional*): Kind of workers. The OCR engine works outside the interpreter lock.
        engine_params (`dict`, *optional*): Settings of RapidOCR by their dotted names, over the ones used here. With
            `{"Rec.rec_img_shape": [3, 48, 96]}` the recognizer does not pad short words to 320 pixels, which is twice
            as fast on them and gives slightly other confidences.
        name, batch_size: See [`Reward`].

    Example:
        >>> OCRReward(workers=1)(prompts=["a red bird"], completions=[Image.new("RGB", (32, 32))])
        [None]

    Reference:
        The OCR reward of Flow-GRPO (arXiv 2505.05470), which runs the same models through PaddleOCR.
    """

    default_name = "ocr"
    range = "0 to 1, larger is better"
    weights_licence = "Apache-2.0 (PP-OCR, inside the rapidocr package)"
    extra = "ocr"

    def __init__(
        self,
        target_column: str | None = None,
        several: str = "first",
        min_side: int = 128,
        confidence: bool = False,
        workers: int = 2,
        pool: str = "thread",
        engine_params: dict[str, Any] | None = None,
        name: str | None = None,
        batch_size: int = 64,
    ) -> None:
        for key, value, known in (("several", several, ("first", "mean")), ("pool", pool, ("thread", "process"))):
            if value not in known:
                raise ValueError(f"`{key}` must be one of {known}. Found {value!r}. Pass one of them.")
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1. Found {workers}. Pass the images read at the same time.")
        super().__init__(name=name, device="cpu", batch_size=batch_size)
        self.target_column, self.several, self.min_side = target_column, several, min_side
        self.confidence, self.workers, self.pool = confidence, workers, pool
        self._read = partial(_read_text, min_side=min_side, engine_params=engine_params or {})

    def targets(self, prompts: Sequence[str], columns: dict[str, Any]) -> list[list[str]]:
        """The target texts of each sample; an empty list where there is none."""
        if self.target_column is not None and self.target_column not in columns:
            raise RewardLoadError(
                f"`target_column` must be a column of the dataset. Found {sorted(columns)}, without "
                f"{self.target_column!r}. Add the column or leave `target_column` out."
            )
        column = self.target_column or next((key for key in ("target", "text") if key in columns), None)
        if column is None:
            return [quoted_targets(prompt) for prompt in prompts]
        return [column_targets(value) for value in columns[column]]

    def _load(self) -> Executor:
        try:
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise ImportError('OCRReward needs rapidocr. Run `pip install "trl_apex[ocr]"`.') from error
        if self.pool == "process":
            return ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
        return ThreadPoolExecutor(self.workers, thread_name_prefix="ocr")

    def _score(self, loaded: Executor, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        targets, arrays = self.targets(prompts, columns), to_arrays(images)
        asked = [i for i, texts in enumerate(targets) if texts]
        pictures = [arrays[i] for i in asked]
        try:
            read = list(self.load().map(self._read, pictures))
        except BrokenProcessPool:  # a worker was killed, and its pool takes no more
            self._loaded = None
            read = list(self.load().map(self._read, pictures))
        rewards: list[float | None] = [None] * len(prompts)
        for i, (text, confidence) in zip(asked, read, strict=True):
            scores = [text_similarity(text, target) for target in targets[i]]
            score = scores[0] if self.several == "first" else sum(scores) / len(scores)
            rewards[i] = score * confidence if self.confidence else score
        return rewards

    def unload(self) -> None:
        """Stop the workers and free their engines."""
        with self._lock:
            if self._loaded is not None:
                self._loaded.shutdown(wait=True)
            super().unload()


def quoted_targets(prompt: str) -> list[str]:
    """The texts that a prompt asks for, in order: between double quotes of any language, or else between single ones.

    Example:
        >>> quoted_targets('a shop sign "Open" on a 5" screen with "24 h"')
        ['Open', '24 h']
        >>> quoted_targets("the baker's sign 'Don't wait', 90s style")
        ["Don't wait"]
    """
    prompt = prompt.translate(PLAIN_QUOTES)
    found = ["".join(groups) for groups in QUOTED.findall(prompt)]
    return [text for text in found or SINGLE.findall(prompt) if normalize_text(text)]


def column_targets(value: Any) -> list[str]:
    """The texts in one row of a dataset's column: a string, number, date or list of them; none for None and NaN.

    Example:
        >>> column_targets("Open"), column_targets(2024.0), column_targets(["24 h"]), column_targets(None)
        (['Open'], ['2024'], ['24 h'], [])
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [text for item in value for text in column_targets(item)]
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps is read as floats
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        value = str(value)
    if isinstance(value, date):  # a file reader may have made it of a text
        value = str(value).removesuffix(" 00:00:00")
    return [value] if isinstance(value, str) and normalize_text(value) else []


def text_similarity(recognized: str, target: str) -> float:
    """How well a recognized text matches the target, which must not be empty.

    `r = 1` if the target is contained, else `1 - min(d, n) / n`, after lower-casing and removing spaces;
    `d = levenshtein(recognized, target)`, `n = len(target)`. Forms of one character that Unicode tells apart
    (composed, full-width, typographic) are the same, and invisible characters do not count.

    Example:
        >>> text_similarity("the C A T sat", "cat"), text_similarity("cut", "cat"), text_similarity("", "cat")
        (1.0, 0.6666666666666667, 0.0)
    """
    recognized, target = normalize_text(recognized), normalize_text(target)
    if not target:
        raise ValueError("`target` must not be empty. Found only white space. Leave the sample out (None) instead.")
    if target in recognized:
        return 1.0
    return 1.0 - min(levenshtein(recognized, target), len(target)) / len(target)


def normalize_text(text: str) -> str:
    """A text in lower case and in Unicode's plain form (NFKC), without white space and invisible characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(PLAIN_SIGNS)
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c) not in INVISIBLE)


def levenshtein(first: str, second: str) -> int:
    """The least number of insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


_engines = threading.local()  # one RapidOCR for each worker


def _read_text(image: np.ndarray, min_side: int, engine_params: dict[str, Any]) -> tuple[str, float]:
    """Read one RGB image with this thread's own engine: its lines joined, and the mean confidence of the characters."""
    if not hasattr(_engines, "engine"):
        from rapidocr import RapidOCR

        _engines.engine = RapidOCR(params={**ENGINE, **engine_params})
    height, width = image.shape[:2]
    if min(height, width) < min_side:
        scale = min_side / min(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    output = _engines.engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False)
    if not output.txts:
        return "", 0.0
    texts = "".join(output.txts[i] for i in reading_order(output.boxes))
    weighed = sum(len(text) * score for text, score in zip(output.txts, output.scores, strict=True))
    return texts, weighed / max(1, len(texts))


def reading_order(boxes: Float[np.ndarray, "N 4 2"]) -> list[int]:
    """The indices of text boxes, row by row and from left to right.

    A box belongs to a row if its middle is less than half a box's height below the middle of the row's first box.
    """
    top, bottom, left = boxes[..., 1].min(1), boxes[..., 1].max(1), boxes[..., 0].min(1)
    middle = (top + bottom) / 2
    rows: list[list[int]] = []
    for i in map(int, np.argsort(middle, kind="stable")):
        first = rows[-1][0] if rows else i
        if not rows or middle[i] - middle[first] >= (bottom[first] - top[first]) / 2:
            rows.append([])
        rows[-1].append(i)
    return [i for row in rows for i in sorted(row, key=lambda i: left[i])]
