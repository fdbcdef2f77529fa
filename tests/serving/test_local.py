"""Servers that the client starts itself, and several servers of one reward, with processes of their own."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loopback import http, running, status_of, wait_for

from trl_apex.cli import main
from trl_apex.rewards import RemoteReward, RewardLoadError
from trl_apex.serving.local import LocalServer, device_variables, make_environment

IMAGES = torch.linspace(0, 1, 24).reshape(24, 1, 1, 1).expand(24, 3, 8, 8)
CALL = {"prompts": ["a"] * 24, "images": IMAGES}
MODULE = """
import os, sys, time
from trl_apex.rewards.base import to_arrays

def brightness(prompts, completions, **kwargs):
    time.sleep(0.2)
    if os.path.exists("die"):
        os.remove("die")
        os._exit(9)
    return [float(array.mean()) for array in to_arrays(completions)]

def prefix(prompts, **kwargs):
    return [float(sys.prefix != os.environ["OUTER"])] * len(prompts)
"""
EXPECTED = [round(255 * x / 23) for x in range(24)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with a module of rewards that both this process and a server may import."""
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OUTER", sys.prefix)
    return tmp_path


@contextmanager
def started(name, **keywords):
    reward = RemoteReward(name=name, command=f"--reward own_rewards:{name}", **keywords)
    try:
        yield reward
    finally:
        reward.close()


def rewards_of(reward, **keywords):
    rewards = asyncio.run(reward(**CALL, **keywords))
    assert rewards.failures == 0
    return rewards


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_is_started_and_stopped(folder):
    with started("brightness", batch_size=12) as reward:
        reward.check()
        url = reward._server.url
        assert rewards_of(reward) == EXPECTED
        assert "command=" in repr(reward)
        # Ctrl-C in a terminal goes to the trainer's group alone, which finishes its iteration.
        assert os.getpgid(reward._server._process.pid) != os.getpgid(0)
    assert status_of(url) == "away"


def test_a_server_that_dies_in_mid_batch_is_started_again_once(folder):
    with started("brightness", batch_size=12) as reward:
        reward.check()
        (folder / "die").touch()
        assert rewards_of(reward) == EXPECTED and not (folder / "die").exists()
        assert reward._server.restarts_left == 0
        (folder / "die").touch()
        with pytest.raises(ConnectionError, match="does not answer"):
            asyncio.run(reward(**CALL))


def test_a_server_on_any_free_port_says_which():
    command = [sys.executable, "-m", "trl_apex", "serve-rewards", "--reward", "jpeg_compressibility", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    url = re.search(r"http://127.0.0.1:[1-9]\d*", server.stdout.readline()).group()
    wait_until(lambda: status_of(url) != "away")
    server.terminate()
    server.wait(60)


def test_a_server_that_cannot_start_says_so(folder):
    reward = RemoteReward(name="brightness", command="--reward own_rewards:nothing")
    with pytest.raises(RewardLoadError, match="has ended"):
        reward.check()


TRAINER = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may have been started without
from trl_apex.rewards import RemoteReward
reward = RemoteReward(name="brightness", command="--reward own_rewards:brightness")
reward.check()
print(reward._server.url, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_server_outlives_the_process_that_started_it(folder, how):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    url = trainer.stdout.readline().strip()
    assert status_of(url) == "ready"
    trainer.send_signal(how)
    trainer.wait(timeout=60)
    trainer.stdout.close()
    wait_until(lambda: status_of(url) == "away")


def test_no_reward_is_lost_when_one_of_two_servers_is_killed_in_mid_batch(folder):
    first, second = (LocalServer("--reward own_rewards:brightness") for _ in range(2))
    try:
        for server in (first, second):
            wait_for(server.url, "ready", server._process)
        reward = RemoteReward([first.url, second.url], "brightness", batch_size=1, max_concurrency=6)
        (folder / "die").touch()  # whichever scores first
        assert rewards_of(reward) == EXPECTED
        assert sorted(status_of(server.url) for server in (first, second)) == ["away", "ready"]
        assert rewards_of(reward) == EXPECTED  # and with one of them away from the start
    finally:
        first.stop()
        second.stop()


def test_requests_are_spread_over_the_servers():
    def count(prompts, **kwargs):
        return [1.0] * len(prompts)

    with running({"count": count}) as one, running({"count": count}) as other:
        rewards_of(RemoteReward([one, f"{other}/"], "count", batch_size=2))
        images = [http.get(f"{url}/metrics").json()["count"]["images"] for url in (one, other)]
    assert sum(images) == 24 and min(images) >= 6


def test_a_server_that_fails_leaves_its_images_to_the_other():
    def broken(prompts, **kwargs):
        return [1.0] * len(prompts)

    broken.load = lambda: 1 / 0
    with running({"count": broken}) as one, running({"count": lambda prompts, **_: [2.0] * len(prompts)}) as other:
        wait_for(one, "failed")
        assert rewards_of(RemoteReward([one, other], "count", batch_size=2)) == [2.0] * 24
        with pytest.raises(RewardLoadError, match="failed"):
            RemoteReward([other, one], "count").check()


@pytest.mark.parametrize(
    "keywords", [{}, {"url": "http://x"}, {"name": "x"}, {"name": "x", "url": "http://x", "command": "-r ocr"}]
)
def test_url_or_command_and_a_name_are_needed(keywords):
    with pytest.raises(ValueError, match="must have a `name`, and either"):
        RemoteReward(**keywords)


def test_the_server_sees_one_accelerator(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_variables("cuda:1") == {"CUDA_VISIBLE_DEVICES": "1"}
    assert device_variables("cpu") == {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert device_variables("cuda:1") == {"CUDA_VISIBLE_DEVICES": "6"}


@pytest.mark.slow
def test_two_environments(folder):
    """The server runs in a virtual environment that `--env` makes; the second start finds it made."""
    requirements = folder / "nothing.txt"
    requirements.write_text("# all packages are those of this environment\n")
    python = make_environment(str(requirements))
    assert python == folder / "envs" / "nothing" / "bin" / "python"
    made = (folder / "envs" / "nothing" / "installed.txt").stat().st_mtime_ns
    for keywords in (
        {"command": "--env nothing.txt --reward own_rewards:prefix"},
        {"command": "--reward own_rewards:prefix", "python": str(python)},
    ):
        reward = RemoteReward(name="prefix", **keywords)
        try:
            reward.check()
            assert rewards_of(reward) == [1.0] * 24
        finally:
            reward.close()
    assert (folder / "envs" / "nothing" / "installed.txt").stat().st_mtime_ns == made


def test_an_environment_needs_a_reward(capsys):
    assert main(["serve-rewards", "--env", "deqa"]) == 2
    assert "must have a `--reward`" in capsys.readouterr().err


def test_an_unknown_environment_is_refused():
    with pytest.raises(ValueError, match="one of deqa, or a requirements file"):
        make_environment("dexa")
