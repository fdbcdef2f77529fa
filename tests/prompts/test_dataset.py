"""Prompts from files, folders, and data in memory."""

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_apex.prompts.datasets import load_prompts

ROWS = [{"prompt": 'a sign, "ÖL"', "target": "ÖL", "level": 3}, {"prompt": "a cat", "target": "", "level": 4}]
DATA = Dataset.from_list(ROWS)


def write(folder, suffix):
    path = folder / f"prompts{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif suffix == ".csv":
        DATA.to_csv(path)
    else:
        DATA.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_keeps_prompts_and_columns(tmp_path, suffix):
    found = load_prompts(str(write(tmp_path, suffix)))
    assert found["prompt"][:] == [row["prompt"] for row in ROWS]
    assert found["level"][:] == [3, 4] and found["target"][0] == "ÖL"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_dates_in_json_stay_the_texts_that_they_are(tmp_path, suffix):
    rows = [{"prompt": "2024-05-01", "target": "2024-05-01"}, {"prompt": "2024-05-02 10:00:00"}]
    path = tmp_path / f"prompts{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    found = load_prompts(path)
    assert found["prompt"][:] == [row["prompt"] for row in rows] and found["target"][:] == ["2024-05-01", None]


def test_codes_with_leading_zeros_in_a_csv_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,plate,level\na sign,007, 3\nanother,12,4\n")
    found = load_prompts(tmp_path / "a.csv")
    assert found["plate"][:] == ["007", "12"] and found["level"][:] == [3, 4]


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Öltank\r\n\n  a cat \n".encode())
    assert load_prompts(path)["prompt"][:] == ["ein Öltank", "a cat"]


def test_a_text_file_is_split_at_newlines_alone(tmp_path):
    prompts = [f'a sign "A{mark}B"' for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(("\r".join(prompts[:2]) + "\r\n" + "\n".join(prompts[2:])).encode())
    assert load_prompts(path)["prompt"][:] == prompts


def test_a_space_after_the_commas_of_a_csv_is_no_part_of_a_name_or_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt, target\na sign, "STOP, NOW"\n')
    assert load_prompts(tmp_path / "a.csv")[:] == {"prompt": ["a sign"], "target": ["STOP, NOW"]}


def test_texts_of_a_csv_stay_as_they_are_written(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("caption,target,level\na sign with 2024,2024,1\n007,007,2\nNA,null,\n1e3,,4\n")
    found = load_prompts(path, prompt_column="caption")
    assert found["prompt"][:] == ["a sign with 2024", "007", "NA", "1e3"]
    assert found["target"][:] == ["2024", "007", "null", ""]
    assert found["level"][:] == [1, 2, None, 4]


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path, ".jsonl")
    assert len(load_prompts(path)) == 2
    path.write_text(json.dumps({"prompt": "a dog"}))
    assert load_prompts(path)["prompt"][:] == ["a dog"]


def test_datasets_splits_and_folders(tmp_path):
    assert load_prompts(DATA) is DATA
    parts = DatasetDict(train=DATA, test=DATA.select([1]))
    assert load_prompts(parts, "test")["prompt"][:] == ["a cat"]
    parts.save_to_disk(tmp_path / "both")
    assert len(load_prompts(tmp_path / "both", "test")) == 1
    DATA.save_to_disk(tmp_path / "one")
    assert len(load_prompts(tmp_path / "one")) == 2
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", ".csv")
    assert len(load_prompts(tmp_path / "files")) == 2
    with pytest.raises(ValueError, match=r"one of \['test', 'train'\] in .*Found 'dev'"):
        load_prompts(tmp_path / "both", "dev")


def test_another_column_and_a_limit():
    renamed = DATA.rename_column("prompt", "caption")
    found = load_prompts(renamed, prompt_column="caption", limit=1)
    assert found["prompt"][:] == ['a sign, "ÖL"'] and found["level"][:] == [3]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "p.json", "well-formed json"),
        ("", "p.csv", "well-formed csv.*it is empty"),
        (b"\xff\xfe\x00", "p.txt", "well-formed txt, in UTF-8"),
        (b"no parquet", "p.parquet", "well-formed parquet"),
        ("x", "p.docx", "must end in one of .json"),
        ("\n \n", "p.txt", "at least one prompt"),
        ('{"prompt": "a"}\n{"prompt": null}', "p.jsonl", "Found NoneType in row 1"),
        ('{"prompt": 17}', "p.jsonl", "Found int in row 0"),
        ('{"caption": "a"}', "p.jsonl", r"must have the column 'prompt'. Found \['caption'\]"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_prompts(str(path))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="must exist"):
        load_prompts(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="a hub dataset that can be reached.*Found 'nobody/nothing'"):
        load_prompts("nobody/nothing")
    with pytest.raises(ValueError, match="Found list"):
        load_prompts(["a cat"])
    with pytest.raises(ValueError, match="Found another column of that name"):
        load_prompts(DATA, prompt_column="target")
