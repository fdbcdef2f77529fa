"""The server's addresses, its settings, and how it starts and stops."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from loopback import running
from PIL import Image

from trl_apex.rewards import JPEGCompressibilityReward, OCRReward
from trl_apex.rewards.by_name import load_reward
from trl_apex.rewards.server import build_app, make_server, read_token

TOKEN = "a-token-of-some-length"
# One client, since making one costs more than a request; a connection each, as the servers come and go.
http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=20)


def zero(prompts, **kwargs):
    return [0.0] * len(prompts)


@pytest.fixture(scope="module")
def url():
    with running([JPEGCompressibilityReward(), zero]) as url:
        yield url


def png(width=8, height=6, colour="red"):
    Image.new("RGB", (width, height), colour).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def files(prompts, images, **metadata):
    form = [("metadata", ("m.json", json.dumps({"prompts": prompts, **metadata}), "application/json"))]
    return form + [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]


def test_health_tells_model_version_and_readiness(url):
    health = http.get(f"{url}/health").json()
    assert health["status"] == "ready" and health["protocol"] == 1 and health["version"]
    assert health["rewards"][0] == {
        "name": "jpeg_compressibility",
        "model": "JPEGCompressibilityReward",
        "state": "ready",
        "range": "kB, below 0, larger is better",
        "weights_licence": "no weights",
    }


def test_png_and_webp_are_read(url):
    Image.new("RGB", (8, 6), "red").save(webp := io.BytesIO(), format="WEBP", lossless=True)
    answer = http.post(f"{url}/v1/rewards/jpeg_compressibility", files=files(["a", "b"], [png(), webp.getvalue()]))
    assert answer.status_code == 200, answer.text
    kilobytes = JPEGCompressibilityReward()(prompts=["a"], completions=[Image.new("RGB", (8, 6), "red")])[0]
    assert answer.json()["rewards"] == [kilobytes, kilobytes] and answer.json()["errors"] == [None, None]


def test_one_broken_image_costs_one_reward(url):
    answer = http.post(
        f"{url}/v1/rewards/jpeg_compressibility", files=files(["a", "b", "c"], [png(), png()[:40], png()])
    ).json()
    assert [reward is None for reward in answer["rewards"]] == [False, True, False]
    assert answer["errors"][0] is None and "broken one" in answer["errors"][1]


def test_metrics_for_prometheus(url):
    http.post(f"{url}/v1/rewards/zero", files=files(["a"], [png()]))
    http.post(f"{url}/v1/rewards/zero", files=files(["a"], []))
    text = http.get(f"{url}/metrics").text
    assert re.search(r'^trl_apex_reward_requests_total\{reward="zero",status="200"\} \d+$', text, re.M)
    assert re.search(r'^trl_apex_reward_requests_total\{reward="zero",status="422"\} \d+$', text, re.M)
    assert re.search(r'^trl_apex_reward_ready\{reward="zero"\} 1$', text, re.M)
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [\d.e+-]+', line), line


def test_openapi_document_describes_the_request(url):
    document = http.get(f"{url}/openapi.json").json()
    content = document["paths"]["/v1/rewards/{name}"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert content["schema"]["properties"]["metadata"] == {"$ref": "#/components/schemas/RewardMetadata"}
    assert set(document["components"]["schemas"]["RewardMetadata"]["properties"]) == {"prompts", "columns", "tensor"}
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_published_openapi_document_is_the_server_s(pytestconfig):
    published = json.loads((pytestconfig.rootpath / "docs" / "reward-server.openapi.json").read_text())
    document = build_app([zero]).openapi()
    assert published["paths"] == document["paths"], "write docs/reward-server.openapi.json again (see docs/rewards.md)"
    assert published["components"] == document["components"]


def test_the_token_guards_all_but_health():
    with running([zero], token=TOKEN) as url:
        assert http.get(f"{url}/health").status_code == 200
        for path in ("/metrics", "/v1/rewards", "/openapi.json", "/nothing"):
            assert http.get(url + path).status_code == 401
            assert http.get(url + path, headers={"Authorization": f"Bearer {TOKEN[:-1]}x"}).status_code == 401
            assert http.get(url + path, headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
            assert http.get(url + path, headers={"Authorization": b"Bearer \xff\xfe"}).status_code == 401
        assert http.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


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
    for bad in ("", "short", "with spaces in the middle", "ä" * 20):
        with pytest.raises(ValueError, match="at least 16 ASCII characters"):
            read_token(bad)


def test_rewards_by_name():
    assert isinstance(load_reward("ocr"), OCRReward)
    assert load_reward("test_server:zero") is zero
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
from trl_apex.rewards.server import serve
serve(["jpeg_compressibility", "slow_reward:slow"], port=int(sys.argv[1]))
"""


@pytest.fixture
def served(tmp_path):
    """`serve()` in a process of its own, as the command line runs it, with a reward from the current folder."""
    (tmp_path / "slow_reward.py").write_text(
        "import time\ndef slow(prompts, **kwargs):\n    time.sleep(0.5)\n    return [0.25] * len(prompts)\n"
    )
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            if http.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    yield process, url
    process.kill()
    process.communicate()


def test_stopping_finishes_what_is_under_way(served):
    process, url = served
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, f"{url}/v1/rewards/slow", files=files(["a"], [png()]), timeout=20)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert answer.result(timeout=20).json()["rewards"] == [0.25]
    out, err = process.communicate(timeout=20)
    assert "Serving jpeg_compressibility, slow on http://127.0.0.1:" in out
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        http.get(f"{url}/health")


def test_arrays_survive_the_wire():
    from trl_apex.rewards.wire import decode_tensor

    array = np.arange(2 * 3 * 4 * 5, dtype="<f4").reshape(2, 3, 4, 5)
    assert (decode_tensor(array.tobytes(), "float32", [2, 3, 4, 5]).numpy() == array).all()
    with pytest.raises(ValueError, match="must hold 480 bytes"):
        decode_tensor(array.tobytes()[:-1], "float32", [2, 3, 4, 5])
    with pytest.raises(ValueError, match="uint8 or float32"):
        decode_tensor(b"", "object", [2, 3, 4, 5])
