"""The server's addresses, its settings, and how it starts and stops."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from loopback import TOKEN, http, running, wait_for
from PIL import Image
from processes import reserved_port

from trl_apex.rewards import JPEGCompressibilityReward, OCRReward, RemoteReward, RewardList
from trl_apex.rewards.registry import load_reward
from trl_apex.serving.server import Limits, build_app, make_server, read_token
from trl_apex.serving.wire import MEDIA_TYPE, encode_request


def zero(prompts, **kwargs):
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def url():
    with running([JPEGCompressibilityReward(), zero]) as url:
        wait_for(url, "ready")
        yield url


def post(url, name, prompts=("a",), **options):
    pictures = [Image.new("RGB", (8, 6), "red")] * len(prompts)
    body = encode_request(prompts, pictures, {})
    return http.post(f"{url}/v1/rewards/{name}", content=body, headers={"Content-Type": MEDIA_TYPE}, **options)


def test_health_tells_model_version_and_readiness(url):
    health = http.get(f"{url}/health").json()
    assert health["status"] == "ready" and health["protocol"] == 2 and health["version"]
    assert health["rewards"][0] == {
        "name": "jpeg_compressibility",
        "model": "JPEGCompressibilityReward",
        "state": "ready",
        "range": "kB, below 0, larger is better",
        "weights_licence": "no weights",
    }


class Movable(JPEGCompressibilityReward):
    moved = 0

    def offload(self):
        self.moved += 1


def test_a_client_has_the_network_offloaded():
    reward = Movable(name="a b")
    with running([reward, zero]) as url:
        wait_for(url, "ready")
        RemoteReward(url, "a b").offload()
        assert reward.moved == 1
        RemoteReward(url, "zero").offload()  # has no network
        with pytest.warns(
            UserWarning, match="does not offload the reward `one`: it answers 404: there is no such reward"
        ):
            RemoteReward(url, "one").offload()
    with pytest.warns(UserWarning, match="does not offload the reward `zero`: ConnectError"):
        RemoteReward(url, "zero").offload()


def test_pictures_are_scored(url):
    answer = post(url, "jpeg_compressibility", ["a", "b"])
    assert answer.status_code == 200, answer.text
    kilobytes = JPEGCompressibilityReward()(prompts=["a"], completions=[Image.new("RGB", (8, 6), "red")])[0]
    assert answer.json()["rewards"] == [kilobytes, kilobytes] and answer.json()["errors"] == [None, None]


def test_metrics_count():
    def half(prompts, **kwargs):
        return RewardList([1.0, None], [None, "broken"])

    with running([half]) as url:
        post(url, "half", ["a", "b"])
        http.post(f"{url}/v1/rewards/half", content=b"", headers={"Content-Type": MEDIA_TYPE})
        counts = http.get(f"{url}/metrics").json()["half"]
    assert counts.pop("seconds") > 0
    assert counts == {"requests_200": 1, "requests_400": 1, "images": 2, "missing": 1, "waiting": 0}


def test_openapi_document_describes_the_request(url):
    document = http.get(f"{url}/openapi.json").json()
    content = document["paths"]["/v1/rewards/{name}"]["post"]["requestBody"]["content"]
    assert list(content) == [MEDIA_TYPE]
    scored = ["/v1/rewards", "/v1/rewards/{name}"]
    assert sorted(document["paths"]) == ["/health", "/metrics", "/v1/offload/{name}", *scored]


def test_strangers_hear_states_and_not_causes():
    class Broken:
        __name__, model = "broken", "a-company/a-model"

        def load(self):
            raise OSError("/home/somebody/weights is not there")

        def __call__(self, **kwargs):
            return []

    key = {"Authorization": f"Bearer {TOKEN}"}
    with running([Broken(), zero], token=TOKEN) as url:
        wait_for(url, "failed")
        answer = http.get(f"{url}/health")
        told = http.get(f"{url}/health", headers=key).json()["rewards"]
        listing = http.get(f"{url}/v1/rewards", headers=key).json()
    assert answer.status_code == 503
    assert {r["name"]: r["state"] for r in answer.json()["rewards"]} == {"broken": "failed", "zero": "ready"}
    assert "somebody" not in answer.text and "a-company" not in answer.text
    assert told == listing and told[0]["state"] == "failed: OSError: /home/somebody/weights is not there"
    assert told[0]["model"].endswith("Broken a-company/a-model")


@pytest.fixture
def hangs():
    """A reward that returns once `hangs.release` is set."""

    def hangs(prompts, **kwargs):
        hangs.release.wait(30)
        return [1.0] * len(prompts)

    hangs.release = threading.Event()
    return hangs


def test_a_reward_that_hangs_fails_alone(hangs):
    with running([hangs, zero], limits=Limits(score_timeout=1)) as url:
        late = post(url, "hangs", ["a", "b"]).json()
        assert late["rewards"] == [None, None] and "no answer within 1 s" in late["errors"][0]
        health = http.get(f"{url}/health")
        states = {reward["name"]: reward["state"] for reward in health.json()["rewards"]}
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert states == {"hangs": "failed: a call has not returned within 1 s", "zero": "ready"}
        refused = post(url, "hangs")
        assert refused.status_code == 500 and "has not returned" in refused.text
        assert post(url, "zero").json()["rewards"] == [0.0]
        hangs.release.set()
        wait_for(url, "ready")
        assert post(url, "hangs").json()["rewards"] == [1.0]


def test_what_waits_for_a_hanging_reward_fails_with_it(hangs):
    with running([hangs], limits=Limits(score_timeout=0.3), max_batch=1) as url, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: post(url, "hangs"), range(6)))  # 6 times 0.3 s, if each had a try
        hangs.release.set()
    assert [a.status_code for a in answers] == [200] * 6 or {a.status_code for a in answers} == {200, 500}
    errors = [a.json()["errors"][0] for a in answers if a.status_code == 200]
    assert sum("no answer" in error for error in errors) == 1
    assert all("has not returned" in error or "no answer" in error for error in errors)


def raising(error):
    """Two rewards that raise it, a blocking one and an async one."""

    def bad(prompts, **kwargs):
        raise error("enough")

    async def bad_async(prompts, **kwargs):
        raise error("enough")

    return {error.__name__: bad, f"{error.__name__}_async": bad_async}


def test_whatever_a_reward_raises_the_server_goes_on():
    rewards = {"zero": zero}
    for error in (StopIteration, SystemExit, GeneratorExit, KeyboardInterrupt, asyncio.CancelledError):
        rewards |= raising(error)
    with running(rewards) as url:
        for name in [*rewards][1:] * 2:
            answer = post(url, name, ["a", "b"]).json()
            assert answer["rewards"] == [None, None] and name.removesuffix("_async") in answer["errors"][0]
            assert post(url, "zero").json()["rewards"] == [0.0]


def test_a_load_that_raises_stop_iteration_is_told():
    class Empty:
        __name__ = "empty"

        def load(self):
            next(iter([]))

        def __call__(self, **kwargs):
            return []

    with running([Empty()]) as url:
        wait_for(url, "failed")
        assert "StopIteration" in http.get(f"{url}/health").json()["rewards"][0]["state"]
        assert post(url, "empty").status_code == 500


def test_https(tmp_path, monkeypatch):
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    with running([zero], ssl_certfile=tmp_path / "cert.pem", ssl_keyfile=tmp_path / "key.pem") as url:
        reward = RemoteReward(url.replace("http://", "https://"), "zero")
        reward.check()
        assert asyncio.run(reward(prompts=["a"], completions=[Image.new("RGB", (4, 4))])) == [0.0]
        with pytest.raises(ValueError, match="no server answers"):
            RemoteReward(url, "zero").check()


def test_the_token_guards_all_but_health():
    with running([zero], token=TOKEN) as url:
        assert http.get(f"{url}/health").status_code == 200
        for path in ("/metrics", "/v1/rewards", "/openapi.json"):
            assert http.get(url + path).status_code == 401
            for wrong in (f"Bearer {TOKEN[:-1]}x", f"Basic {TOKEN}", b"Bearer \xff\xfe"):
                assert http.get(url + path, headers={"Authorization": wrong}).status_code == 401
        assert http.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert post(url, "zero").status_code == 401


def test_without_a_token_web_pages_are_refused(url):
    assert http.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 403
    assert http.post(f"{url}/v1/rewards/zero", headers={"Origin": "https://evil.example"}).status_code == 403
    assert http.get(f"{url}/health", headers={"Host": "localhost:1"}).status_code == 200


def test_other_addresses_need_a_token(monkeypatch):
    monkeypatch.delenv("TRL_APEX_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ValueError, match="must have a token. Found none"):
            make_server([zero], host=host)
    assert make_server([zero], host="0.0.0.0", token=TOKEN).config.host == "0.0.0.0"


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("TRL_APEX_REWARD_TOKEN", "the-token-of-the-environment")
    assert read_token(TOKEN) == TOKEN
    assert read_token(token_file=tmp_path / "token") == TOKEN
    assert read_token() == "the-token-of-the-environment"
    monkeypatch.delenv("TRL_APEX_REWARD_TOKEN")
    assert read_token() is None
    assert read_token(f" {TOKEN}\n") == TOKEN
    for bad in ("", "short", "with spaces in the middle", "ä" * 20):
        with pytest.raises(ValueError, match="at least 16 ASCII characters|printable ASCII without spaces") as caught:
            read_token(bad)
        assert not bad or bad not in str(caught.value)


def test_rewards_by_name():
    assert isinstance(load_reward("ocr"), OCRReward)
    assert load_reward(f"{__name__}:zero") is zero
    for spec, message in [
        ("nothing", "must be one of aesthetic"),
        ("no.module:x", "must be importable"),
        ("json:nothing", "must be importable"),
        ("json:__name__", "must be callable"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(spec)
    with pytest.raises(ValueError, match="a name of its own"):
        build_app([zero, zero])
    with pytest.raises(ValueError, match="Found none"):
        build_app([])


SERVE = """
import sys
from trl_apex.serving.server import serve
serve(["jpeg_compressibility", "slow_reward:slow"], port=int(sys.argv[1]))
"""


@pytest.fixture
def served(tmp_path):
    """`serve()` in a process of its own, as the command line runs it, with a reward from the current folder."""
    (tmp_path / "slow_reward.py").write_text(
        "import pathlib, time\n"
        "def slow(prompts, **kwargs):\n"
        "    pathlib.Path('entered').touch()\n"
        "    time.sleep(0.5)\n"
        "    return [0.25] * len(prompts)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command, pipes = [sys.executable, "-c", SERVE], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with reserved_port() as port:
        process = subprocess.Popen([*command, str(port)], cwd=tmp_path, env=environment, text=True, **pipes)
        url = f"http://127.0.0.1:{port}"
        wait_for(url, "ready", process)
        yield process, url
    process.kill()
    process.communicate()


def test_stopping_finishes_what_is_under_way(served, tmp_path):
    process, url = served
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, url, "slow")
        while not (tmp_path / "entered").exists():
            assert not answer.done()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert answer.result(timeout=20).json()["rewards"] == [0.25]
    out, err = process.communicate(timeout=20)
    assert "Serving jpeg_compressibility, slow on http://127.0.0.1:" in out
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        http.get(f"{url}/health")


def test_limits():
    assert Limits(max_body=10, max_memory=25).requests == 2 and Limits(max_body=10, max_memory=5).requests == 1
    with pytest.raises(ValueError, match="`max_images` must be positive"):
        Limits(max_images=0)
    for old in ("max_queue", "header_timeout"):
        with pytest.warns(FutureWarning, match=f"`{old}` has no effect"):
            Limits(**{old: 5})
