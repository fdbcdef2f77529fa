"""What strangers may send: the server answers each with a refusal, stays alive and forgets it."""

import asyncio
import json
import os
import pickle
import socket
import threading

import httpx
import psutil
import pytest
from loopback import http, running, wait_for

from trl_apex.rewards import JPEGCompressibilityReward
from trl_apex.serving.server import Limits
from trl_apex.serving.wire import MEDIA_TYPE

LIMITS = Limits(
    max_body=2_000_000,
    max_memory=8_000_000,
    max_images=8,
    max_pixels=512 * 512,
    max_prompt=500,
    max_metadata=20_000,
    max_connections=64,
    body_timeout=0.6,
)
REWARD = "/v1/rewards/jpeg_compressibility"
PIXELS = bytes(range(12))


@pytest.fixture(scope="module")
def served():
    with running([JPEGCompressibilityReward()], limits=LIMITS) as url:
        wait_for(url, "ready")
        yield url


@pytest.fixture
def url(served, caplog):
    """After every attack the server scores, waits for nobody, and nothing escaped unhandled."""
    yield served
    answer = post(served, header(["a"]) + PIXELS)
    assert answer.status_code == 200 and answer.json()["rewards"][0] < 0
    assert http.get(f"{served}/metrics").json()["jpeg_compressibility"]["waiting"] == 0
    assert "Exception in ASGI application" not in caplog.text


def header(prompts, sizes=None, **more):
    return json.dumps({"prompts": prompts, "sizes": sizes or [[2, 2]] * len(prompts), **more}).encode() + b"\n"


def post(url, body, kind=MEDIA_TYPE, **headers):
    return http.post(url + REWARD, content=body, headers={"Content-Type": kind, **headers})


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_stay_closed(url, tmp_path):
    payload = pickle.dumps(Exploit(tmp_path / "pwned"))
    answers = [
        post(url, payload),
        post(url, payload + b"\n"),
        post(url, payload, "application/x-pickle"),
        post(url, payload, "multipart/form-data; boundary=x"),
        post(url, header(["a"]) + payload),
        post(url, header(["a"], dtype="object") + payload),
        post(url, header(["a"], [[1, len(payload)]]) + payload * 3),  # as pixels, which it then is
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 415, 415, 422, 422, 200]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 15_000, 400),
        (b'{"a":' * 3_000, 400),
        (b'{"prompts": ["\\ud800"]}', 400),
        (b'{"prompts": ["a"], "columns": {"x": [NaN]}}', 400),
        (b'{"prompts": ["a"], "columns": {"x": [1e999]}}', 400),
        (b'{"prompts": ["a"], "columns": {"x": [' + b"9" * 5_000 + b"]}}", 400),
        (b"null", 422),
        (b"[]", 422),
        (b'{"prompts": ["a"]}', 422),
        (b'{"prompts": [], "sizes": []}', 422),
        (b'{"prompts": "a", "sizes": [[2, 2]]}', 422),
        (b'{"prompts": [1], "sizes": [[2, 2]]}', 422),
        (header(["a"], more=1), 422),
        (header(["a"], columns={"x": ["a", "b"]}), 422),
        (header(["a"], columns={"images": ["a"]}), 422),
        (header(["a"], columns={"self": ["a"]}), 422),
        (header(["a", "b"], [[2, 2]]), 422),
        (header(["a"], dtype="float32"), 422),
        (header(["a", "b"], [[2, 2], [2, 1]], floats=True), 422),
        (header(["a" * 501]), 413),
        (header(["a"] * 9), 413),
        (header(["a" * 30_000]), 413),
    ],
)
def test_headers_that_are_none(url, line, status):
    answer = post(url, line.rstrip(b"\n") + b"\n" + PIXELS)
    assert answer.status_code == status, answer.text
    assert len(answer.json()["detail"]) < 400


def test_a_body_without_a_line(url):
    assert post(url, b"").status_code == 400
    assert post(url, header(["a"])[:-1]).status_code == 400
    assert post(url, b" " * 100_000).status_code == 413


@pytest.mark.parametrize(
    ("size", "count", "status"),
    [
        ([2, 2], 11, 422),
        ([2, 2], 13, 422),
        ([0, 2], 0, 422),
        ([-2, -2], 12, 422),
        ([2, 2, 1], 12, 422),
        ([2.5, 2], 12, 422),
        (["2", 2], 12, 422),
        ([True, 2], 6, 422),
        ([2**40, 2**40], 12, 413),
        ([2**200, 2**200], 12, 413),
        ([513, 512], 3 * 513 * 512, 413),
    ],
)
def test_sizes_that_do_not_fit(url, size, count, status):
    answer = post(url, header(["a"], [size]) + bytes(count))
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("kind", ["application/json", "", "\x7f", "multipart/form-data", f"x{MEDIA_TYPE}"])
def test_other_kinds_of_body(url, kind):
    answer = post(url, header(["a"]) + PIXELS, kind)
    assert answer.status_code == 415 and MEDIA_TYPE in answer.json()["detail"]
    assert ("0.1 sends that" in answer.text) == (kind == "multipart/form-data")


def test_bodies_that_are_too_large(url):
    assert post(url, header(["a"]) + bytes(3_000_000)).status_code == 413
    head = f"POST {REWARD} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MEDIA_TYPE}\r\n{{}}\r\n\r\n"
    with connect(url) as connection:  # told beforehand: refused before a byte of it is read
        connection.sendall(head.format("Content-Length: 99999999999").encode())
        assert answer_line(connection).startswith(b"HTTP/1.1 413")
    with connect(url) as connection:  # not told: refused as well
        connection.sendall(head.format("Transfer-Encoding: chunked").encode())
        assert answer_line(connection).startswith(b"HTTP/1.1 411")


def test_a_client_that_still_sends_gets_to_read_a_refusal(url):
    body = header(["a"]) + bytes(1_900_000)
    for _ in range(10):
        assert post(url, body, "multipart/form-data").status_code == 415
        assert http.post(f"{url}/v1/rewards/none", content=body).status_code == 404
        assert post(url, body, Origin="http://evil.example").status_code == 403


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_line(connection):
    try:
        return connection.recv(65536).partition(b"\r\n")[0]
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # a TLS greeting
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST " + REWARD.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST " + REWARD.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/rewards/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: [localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_http_that_is_none(url, data):
    with connect(url) as connection:
        try:
            connection.sendall(data)
            line = answer_line(connection)
        except (BrokenPipeError, ConnectionResetError):
            line = b""
    assert line == b"" or (line.startswith(b"HTTP/1.1 ") and line[9:12] != b"500")


def slow_request(url, length=1_000_000):
    """A connection that has sent a head and the first bytes of a body."""
    connection = connect(url)
    connection.sendall(
        f"POST {REWARD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        f"Content-Type: {MEDIA_TYPE}\r\n\r\n{{".encode()
    )
    return connection


def test_slow_bodies_are_cut_off(url):
    with slow_request(url) as connection:
        connection.settimeout(5)
        stop = threading.Event()

        def drip():
            while not stop.wait(0.05):
                try:
                    connection.sendall(b"A")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        line = answer_line(connection)
        stop.set()
        thread.join()
        assert line.startswith(b"HTTP/1.1 408")


def test_slow_clients_do_not_shut_others_out(url):
    """Four bodies are read at a time: twelve slow ones are cut off in turn, and who waits behind them is served."""
    slow = [slow_request(url) for _ in range(12)]
    try:
        assert http.get(f"{url}/health").status_code == 200
        assert post(url, header(["a"]) + PIXELS).status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_clients_that_leave_in_the_middle(url):
    for _ in range(20):
        slow_request(url).close()
    assert post(url, header(["a"]) + PIXELS).status_code == 200


def test_more_connections_than_allowed(url):
    many = [connect(url) for _ in range(80)]
    try:
        statuses = {http.get(f"{url}/health").status_code for _ in range(3)}
        assert statuses == {503}
    finally:
        for connection in many:
            connection.close()
    while http.get(f"{url}/health").status_code != 200:  # the server has yet to see them go
        pass


def test_bodies_wait_unread(url):
    """Forty bodies of 1.9 MB where 8 MB may be held: all are scored, and they are never in memory together."""
    body = header(["a"] * 8, [[281, 281]] * 8) + bytes(8 * 3 * 281 * 281)
    before = psutil.Process().memory_info().rss
    head = (
        f"POST {REWARD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nContent-Type: {MEDIA_TYPE}\r\n\r\n"
    ).encode()
    connections = [connect(url) for _ in range(40)]
    threads = [threading.Thread(target=connection.sendall, args=(head + body,)) for connection in connections]
    for thread in threads:
        thread.start()
    lines = [answer_line(connection)[:12] for connection in connections]
    for thread, connection in zip(threads, connections, strict=True):
        thread.join()
        connection.close()
    assert lines == [b"HTTP/1.1 200"] * 40
    assert psutil.Process().memory_info().rss - before < 70 * 2**20


async def flood(url, count, at_once):
    """`count` requests, `at_once` under way; the number of each answer."""
    gate, seen = asyncio.Semaphore(at_once), {}
    host, port = url.removeprefix("http://").split(":")
    body, kind = header(["a"]) + PIXELS, {"Content-Type": MEDIA_TYPE}
    request = httpx.Request("POST", url + REWARD, content=body, headers=kind)
    head = f"POST {REWARD} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in request.headers.items()) + "\r\n"
    data = head.encode() + request.read()

    async def one():
        async with gate:
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 30)
                writer.write(data)
                status = (await asyncio.wait_for(reader.readline(), 60))[9:12].decode() or "closed"
                writer.close()
            except OSError:
                status = "closed"
            except TimeoutError:
                status = "timeout"
        seen[status] = seen.get(status, 0) + 1

    await asyncio.gather(*(one() for _ in range(count)))
    return seen


@pytest.mark.parametrize(
    ("count", "at_once"),
    [(600, 300), pytest.param(10_000, 10_000, marks=pytest.mark.slow)],
)
def test_floods(count, at_once):
    process = psutil.Process()
    with running([JPEGCompressibilityReward()]) as url:
        before = process.memory_info().rss
        seen = asyncio.run(flood(url, count, at_once))
        grown = process.memory_info().rss - before
        print(f"{seen}, {grown / 2**20:.0f} MB more")
        assert http.get(f"{url}/health").status_code == 200
    assert sum(seen.values()) == count
    assert set(seen) <= {"200", "503", "closed"}, seen
    assert seen.get("200", 0) > 0
    assert grown < 400 * 2**20, f"{grown / 2**20:.0f} MB more after {count} requests"
