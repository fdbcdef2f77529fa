"""The page: self-contained, complete, lenient about what is missing, and safe against what a prompt may hold."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from example_run import write_run

from trl_apex.report import write_report


class Page(HTMLParser):
    """The elements of a page, and its text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: str | None = None
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.raw = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.raw = None

    def handle_data(self, data: str) -> None:
        if self.raw is None:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(complete_run: Path) -> Page:
    return Page(write_report([complete_run]))


def test_it_lies_in_the_run_directory_and_needs_no_network(complete_run: Path, page: Page) -> None:
    assert (complete_run / "report.html").is_file()
    assert "//" not in re.sub(r"data:image/[a-z]+;base64,[\w+/=]+|// [A-Z].*", "", page.source)
    addresses = [a[k] for _, a in page.elements for k in ("src", "href") if k in a]
    assert addresses and all(str(a).startswith(("data:", "#")) for a in addresses)


def test_it_shows_every_part(page: Page) -> None:
    sections = "Results, Before and after, Training rewards, Priorities, Conflict and hijacking, Trade-offs"
    said = "+0.14 ± 0.02, +0.58 ± 0.08, never trained on, test prompts 96, images an iteration 8 prompts × 8"
    for words in f"{sections}, {said}, training time 0:02:11".split(", "):
        assert words in page.text, words
    assert "Objectives: 3 rose, 1 stayed within noise. On 45% of the test prompts" in page.text
    assert "Not found" not in page.text and "No " not in page.text
    labels = [svg["aria-label"] or "" for svg in page.all("svg")]
    priorities = "Priority, Learning potential, Conflict penalty, Progress need, Whose advantage it is"
    for title in f"ocr, pickscore against ocr, gain +0.58, ocr · deqa, Gradient norm, {priorities}".split(", "):
        assert any(label.startswith(title) for label in labels), title
    assert sum("against" in label.split(".")[0] for label in labels) == 6  # pairs of four objectives


@pytest.mark.parametrize(
    "file,content,sentence",
    [
        ("trainer_state.json", '{"global_step": "a"}', "has no proper global_step"),
        ("trainer_state.json", '{"global_step": 4, "log_history": null}', "has no proper log_history"),
        ("summary.json", '{"objectives": {}, "seconds": 5}', "has no proper seconds"),
        ("summary.json", '{"objectives": {"ocr": 5}}', "Results"),
        ("config.json", '{"num_generations": "x", "generation_batch_size": [1]}', "Arguments"),
    ],
)
def test_a_file_of_a_wrong_form_is_named_and_the_rest_shown(complete_run, tmp_path, file, content, sentence) -> None:
    run = Path(shutil.copytree(complete_run, tmp_path / "run"))
    (run / file).write_text(content)
    text = Page(write_report([run])).text
    assert "Arguments" in text and sentence in text


def test_training_time_counts_all_parts_of_a_resumed_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / "summary.json").unlink()
    history = [{"step": 4, "step_time": 60.0}, {"step": 10, "step_time": 20.0}, {"step": 10, "train_runtime": 0.5}]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": history}))
    assert "training time 0:06:00" in Page(write_report([run])).text


def test_every_control_and_picture_has_a_name(page: Page) -> None:
    assert len(page.all("input")) == 7 and all(i.get("aria-label") for i in page.all("input"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))
    assert all(image.get("alt") for image in page.all("img"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a")} <= {f"#{name}" for name in ids}


def test_no_coordinate_is_broken(page: Page) -> None:
    shapes = [a for tag, a in page.elements if tag in ("path", "line", "circle", "rect", "text")]
    assert len(shapes) > 200
    assert not any("nan" in str(value) or "inf" in str(value) for a in shapes for value in a.values())


def test_secrets_stay_out(page: Page) -> None:
    assert "hf_abcdefghijklmnop" not in page.source and "(hidden)" in page.text


def test_text_of_a_prompt_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, samples=1)
    prompts = [
        {"prompt": "<script>alert(1)</script> \"quoted\" onload='x'", "base": {"<b>": 1.0}, "tuned": {"<b>": 2.0}}
    ]
    (run / "samples" / "prompts.json").write_text(json.dumps(prompts))
    page = Page(write_report([run]))
    assert len(page.all("script")) == 1 and '<th scope="row">&lt;b&gt;</th>' in page.source
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    "absent,sentence",
    [
        ("trainer_state.json", "No training curves"),
        ("summary.json", "No held-out results"),
        ("config.json", "No arguments"),
        ("samples", "No images to compare"),
        ("samples/prompts.json", "the images have no prompts"),
    ],
)
def test_what_is_missing_is_said(complete_run: Path, tmp_path: Path, absent: str, sentence: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(complete_run, run)
    shutil.rmtree(run / absent) if absent == "samples" else (run / absent).unlink()
    page = Page(write_report([run]))
    assert sentence in page.text and absent in page.text


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"][1]["rewards/ocr/mean"] = float("nan")
    state["log_history"][2]["priority/ocr"] = float("inf")
    state["log_history"][3]["rewards/ocr/mean"] = None
    (run / "trainer_state.json").write_text(json.dumps(state))
    source = write_report([run]).read_text()
    assert not re.search(r'(?:d|x1|y1|cx|cy)="[^"]*(?:nan|inf)', source)


def test_a_run_of_one_step_and_one_objective(tmp_path: Path) -> None:
    state = {"global_step": 1, "log_history": [{"step": 1, "rewards/ocr/mean": 0.5, "loss": 0.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    page = Page(write_report([tmp_path]))
    assert "No two objectives to compare" in page.text and "No priorities in the log" in page.text


@pytest.mark.parametrize("states", [{"checkpoint-9": 9, "checkpoint-10": 10}, {"": 8, "checkpoint-10": 10}])
def test_the_newest_state_is_shown(tmp_path: Path, states: dict[str, int]) -> None:
    for folder, step in states.items():  # a run that was killed, or continued and killed, leaves its checkpoints
        (tmp_path / folder).mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [{"step": step, "rewards/ocr/mean": 0.5}]}
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps(state))
    assert "optimizer steps 10" in Page(write_report([tmp_path])).text


@pytest.mark.parametrize(
    "foreign", [{"_class_name": "SD3Transformer2DModel"}, {"model_type": "qwen3", "vocab_size": 7}]
)
def test_the_configuration_of_a_network_is_not_taken_for_the_runs(tmp_path: Path, foreign: dict) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (run / "config.json").write_text(json.dumps(foreign))
    assert "No arguments: this run has no config.json" in Page(write_report([run])).text


def test_arguments_that_were_set_come_before_the_defaults(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, learning_rate=1e-4, vllm_mode="server")
    (run / "environment.json").write_text(
        json.dumps({"changed": ["learning_rate", "seed"], "date": "2026-01-02 03:04"})
    )
    page = Page(write_report([run]))
    assert "2 arguments that were set learning_rate 0.0001 seed 0" in page.text.replace(
        "learning_ rate", "learning_rate"
    )
    assert "vllm_mode" not in page.text.replace("_ ", "_") and "date 2026-01-02 03:04" in page.text
    assert not any("open" in details for details in page.all("details"))


def test_long_names_and_negative_rewards_are_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("jpeg_compressibility", "negative_brightness_of_background", "vlm_judge_composition", "hps")
    monkeypatch.setattr("example_run.LEVELS", dict.fromkeys(names, (-12.5, 1.2, 2.0)))
    page = Page(write_report([write_run(tmp_path / "run", steps=4)]))
    assert "\N{HORIZONTAL ELLIPSIS}" not in page.text
    for name in names:
        assert page.text.replace("_ ", "_").count(name) > 6, name


def test_several_runs_are_compared(complete_run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "demo", seed=1, learning_rate=1e-4)
    path = write_report([complete_run, other], tmp_path / "comparison.html")
    page = Page(path)
    assert path == tmp_path / "comparison.html"
    assert "3 arguments differ" in page.text and "learning_ rate 0.0003 0.0001 seed 0 1" in page.text
    assert "runs/demo" in page.text  # two folders of one name


def test_a_run_of_a_language_model_shows_completions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    shutil.rmtree(run / "samples")
    (run / "completions").mkdir()
    for step in (1, 2, 30):  # as `log_completions=True` leaves them, plain and as a conversation
        prompts = ["say a", "say a", "say <b>"]
        said: list = [f"early {i}" if step == 1 else [{"role": "assistant", "content": f"late {i}"}] for i in range(3)]
        columns = {"prompt": prompts, "completion": said, "short": [0.25, 1.0, None], "advantage": [0.5, -0.5, 0.0]}
        table = pyarrow.table({"step": [step] * 3, **columns})
        pyarrow.parquet.write_table(table, run / "completions" / f"completions_{step:05d}.parquet")
    page = Page(write_report([run]))
    assert "step 1 say a early 0 short 0.25 advantage 0.5" in page.text
    assert "step 30 say a late 0" in page.text and "say <b> late 2 advantage 0" in page.text
    assert "early 1" not in page.text and "step 2 " not in page.text, "one completion of a prompt, first and last log"
    assert "No images to compare" not in page.text and "Before and after" not in page.text


def test_trouble_is_pointed_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    state = json.loads((run / "trainer_state.json").read_text())
    for entry in state["log_history"][:4]:
        entry |= {"reward_failures/ocr": 2.0, "live_groups/deqa": 0.0, "skipped_updates/dead": 1.0}
    (run / "trainer_state.json").write_text(json.dumps(state))
    (run / "warnings.jsonl").write_text(json.dumps({"step": 3, "text": "The server was slow."}) + "\n")
    text = Page(write_report([run])).text
    assert "Step 3: The server was slow." in text
    assert "ocr failed for 8 images" in text and "deqa scored the images of every group alike" in text
    assert "4 updates had only zero advantages" in text


def test_a_wrong_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Found no directory"):
        write_report([tmp_path / "absent"])
    with pytest.raises(FileNotFoundError, match="Found none of them"):
        write_report([tmp_path])
    with pytest.raises(ValueError, match="at least one run directory"):
        write_report([])
