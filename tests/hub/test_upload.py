"""Uploads to a hub on loopback: what arrives, what stays, and what is said when it fails."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback_hub import READER, STRANGER, WRITER, Hub, Repo

from trl_apex.redact import redacted
from trl_apex.trainers.publishing import PushError, push_run, refresh_model_card, trying


def push(run_dir: Path, hub: Hub, repo_id: str = "me/apex", token: str = WRITER, **options) -> str:
    refresh_model_card(run_dir, repo_id)
    return push_run(run_dir, repo_id, token=token, endpoint=hub.url, **options)


def snapshot(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_everything_that_is_needed_arrives_in_one_commit(run_dir: Path, hub: Hub) -> None:
    assert push(run_dir, hub) == f"{hub.url}/me/apex"
    repo = hub.repos["me/apex"]
    assert repo.commits == ["Upload run"]
    expected = {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "aggregator_state.json",
        "summary.json",
        "config.json",
    }
    assert expected <= set(repo.files)
    for path, content in repo.files.items():
        assert content == (run_dir / path).read_bytes()


def test_no_secret_pickle_or_checkpoint_arrives(run_dir: Path, hub: Hub) -> None:
    for name in ("config.json", "environment.json"):  # as the trainer's record writes them
        (run_dir / name).write_text(json.dumps(redacted(json.loads((run_dir / name).read_text()))))
    push(run_dir, hub)
    files = hub.repos["me/apex"].files
    assert not [path for path in files if path.endswith(".bin") or path.startswith(("checkpoint", "completions"))]
    assert not [path for path, content in files.items() if b"hf_secret" in content]


def test_a_new_repository_can_be_private_and_strangers_do_not_see_it(run_dir: Path, hub: Hub) -> None:
    push(run_dir, hub, private=True)
    assert hub.repos["me/apex"].private
    with pytest.raises(PushError, match="no repository me/apex"):
        push(run_dir, hub, token=STRANGER, create=False)


def test_a_second_upload_goes_to_the_same_repository(run_dir: Path, hub: Hub) -> None:
    push(run_dir, hub)
    (run_dir / "aggregator_state.json").write_text("{}")
    push(run_dir, hub, commit_message="Again")
    assert hub.repos["me/apex"].commits == ["Upload run", "Again"]
    assert hub.repos["me/apex"].files["aggregator_state.json"] == b"{}"


@pytest.mark.parametrize(
    "token,repo_id,create,message",
    [
        ("hf_wrongwrongwrong", "me/apex", True, "does not accept the token"),
        (READER, "me/apex", True, "may not write to me/apex"),
        (WRITER, "me/apex", False, "no repository me/apex"),
        (WRITER, "me/a b", True, "is no name of a repository"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(
    run_dir: Path, hub: Hub, token: str, repo_id: str, create: bool, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    refresh_model_card(run_dir, "me/apex")
    before = snapshot(run_dir)
    with pytest.raises(PushError, match=message) as raised:
        push_run(run_dir, repo_id, token=token, endpoint=hub.url, create=create)
    assert raised.value.user
    assert f"trl-apex push {run_dir} --repo-id {repo_id}" in str(raised.value)
    assert snapshot(run_dir) == before and hub.repos == {}
    assert token not in str(raised.value) and token not in caplog.text


@pytest.mark.parametrize("fault", ["cut", "unavailable"])
def test_a_broken_connection_is_tried_again(run_dir: Path, hub: Hub, fault: str) -> None:
    hub.repos["me/apex"] = Repo()
    hub.fail(fault, 2)
    push(run_dir, hub)
    assert hub.faults == 0 and hub.repos["me/apex"].commits == ["Upload run"]


def test_a_connection_that_stays_broken_loses_nothing_and_a_later_try_works(run_dir: Path, hub: Hub) -> None:
    refresh_model_card(run_dir, "me/apex")
    before = snapshot(run_dir)
    hub.fail("cut", 1000)
    with pytest.raises(PushError, match="the connection to http://127.0.0.1.* failed .*Nothing is lost") as raised:
        push(run_dir, hub)
    assert not raised.value.user
    assert hub.repos["me/apex"].files == {}, "half an upload must not show"
    assert snapshot(run_dir) == before
    hub.fail("", 0)
    push(run_dir, hub)
    assert "pytorch_lora_weights.safetensors" in hub.repos["me/apex"].files


def test_an_error_that_is_not_the_networks_is_not_tried_again() -> None:
    calls = []

    def attempt() -> None:
        calls.append(1)
        raise TypeError("a mistake in the code")

    with pytest.raises(PushError, match="TypeError: a mistake in the code") as raised:
        trying(attempt, "me/apex", "http://hub")
    assert len(calls) == 1 and not raised.value.user


def test_nobody_listens(run_dir: Path, hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(PushError, match="the connection to http://127.0.0.1"):
        push(run_dir, hub)


def test_a_folder_without_weights_is_not_uploaded(tmp_path: Path, run_dir: Path, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="Found no directory"):
        push_run(tmp_path / "absent", "me/apex", endpoint=hub.url)
    (run_dir / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold weights"):
        push_run(run_dir, "me/apex", endpoint=hub.url)
    assert hub.requests == []


def test_offline_mode_is_named(run_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="Unset HF_HUB_OFFLINE"):
        push(run_dir, hub)
