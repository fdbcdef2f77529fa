"""`trl-apex push` against a hub on loopback."""

from pathlib import Path

import pytest
from loopback_hub import WRITER, Hub

from trl_apex.cli import main


@pytest.fixture
def push(hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command; returns exit code, what was printed, and the lines on stderr."""

    def call(*flags: str, token: str = WRITER):
        monkeypatch.setenv("HF_TOKEN", token)
        code = main(["push", str(run_dir), "--repo-id", "me/apex", *flags])
        shown = capsys.readouterr()
        return code, shown.out, [line for line in shown.err.splitlines() if line.startswith("trl-apex")]

    return call


def test_a_run_is_uploaded_with_report_pictures_and_card(push, hub: Hub) -> None:
    code, out, errors = push("--private", "--message", "First")
    assert (code, errors) == (0, []) and f"{hub.url}/me/apex" in out
    repo = hub.repos["me/apex"]
    assert repo.private and repo.commits == ["First"]
    assert {"report.html", "figures/rewards.png", "figures/samples.png", "README.md"} <= set(repo.files)
    assert "figures/samples.png" in repo.files["README.md"].decode()


def test_a_broken_file_of_the_run_is_named(push, run_dir: Path) -> None:
    (run_dir / "config.json").write_text('{"model": ')
    code, _, (line,) = push()
    assert code == 2 and "config.json must be a JSON file" in line


def test_a_wrong_token_is_one_line_and_exit_code_2(push) -> None:
    code, _, (line,) = push(token="hf_wrongwrongwrong")
    assert code == 2 and "does not accept the token" in line and "hf_wrong" not in line


def test_a_cut_connection_is_exit_code_1_and_the_printed_command_works(push, hub: Hub) -> None:
    hub.fail("cut", 1000)
    code, _, (line,) = push()
    assert code == 1 and "Nothing is lost" in line
    hub.fail("", 0)
    assert main(line.split("To try again: trl-apex ")[1].split()) == 0
    assert hub.repos["me/apex"].commits == ["Upload run"]


def test_a_missing_repository_is_named(push) -> None:
    code, _, (line,) = push("--no-create")
    assert code == 2 and "there is no repository me/apex" in line
