"""What strangers may send: the server answers each with a refusal, stays alive and forgets it."""

import asyncio
import contextlib
import io
import json
import os
import pickle
import socket
import struct
import threading
import time
import zlib

import httpx
import psutil
import pytest
from loopback import running
from PIL import Image

from trl_apex.rewards import JPEGCompressibilityReward
from trl_apex.rewards.limits import Limits
from trl_apex.rewards.server import make_server

LIMITS = Limits(
    max_body=2_000_000,
    max_memory=8_000_000,
    max_images=8,
    max_pixels=512 * 512,
    max_prompt=500,
    max_metadata=20_000,
    max_connections=64,
    header_timeout=0.6,
    body_timeout=0.6,
)
# One client, since making one costs more than a request; a connection each.
http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=20)
REWARD = "/v1/rewards/jpeg_compressibility"


@pytest.fixture(scope="module")
def url():
    with running([JPEGCompressibilityReward()], limits=LIMITS) as url:
        yield url


@pytest.fixture(autouse=True)
def still_alive(url, caplog):
    """After every attack: the server scores, holds no memory, and nothing escaped unhandled."""
    yield
    answer = http.post(url + REWARD, files=[metadata(["a"]), image(png())])
    assert answer.status_code == 200 and answer.json()["rewards"][0] < 0
    assert "trl_apex_reward_held_bytes 0" in http.get(f"{url}/metrics").text
    assert "Exception in ASGI application" not in caplog.text


def png(width=8, height=6):
    Image.new("RGB", (width, height), "red").save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height, data=None):
    """A PNG whose header claims a size, with as little data as one likes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(bytes(1000)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def webp_canvas(width, height):
    """A WebP whose extended header claims a canvas."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00\x00\x00\x00" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def metadata(prompts, **more):
    return ("metadata", ("m.json", json.dumps({"prompts": prompts, **more}), "application/json"))


def raw_metadata(data):
    return ("metadata", ("m.json", data, "application/json"))


def image(data, name="images"):
    return (name, ("x.bin", data, "image/png"))


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_stay_closed(url, tmp_path):
    payload = pickle.dumps(Exploit(tmp_path / "pwned"))
    form = {"dtype": "uint8", "shape": [1, 3, 2, 2]}
    answers = [
        http.post(url + REWARD, content=payload),
        http.post(url + REWARD, content=payload, headers={"Content-Type": "multipart/form-data; boundary=x"}),
        http.post(url + REWARD, content=payload, headers={"Content-Type": "application/x-pickle"}),
        http.post(url + REWARD, files=[metadata(["a"]), image(payload)]),
        http.post(url + REWARD, files=[metadata(["a"], tensor=form), image(payload, "tensor")]),
        http.post(url + REWARD, files=[raw_metadata(payload), image(png())]),
        http.post(url + REWARD, files=[metadata(["a"], tensor={**form, "dtype": "object"}), image(payload, "tensor")]),
    ]
    assert [answer.status_code for answer in answers] == [415, 400, 415, 200, 422, 400, 422]
    assert answers[3].json()["rewards"] == [None] and "PNG or WebP" in answers[3].json()["errors"][0]
    assert not (tmp_path / "pwned").exists()


noise = io.BytesIO()
Image.effect_noise((64, 64), 90).save(noise, format="PNG")
noise = noise.getvalue()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "another kind"),
        (b"\x89PNG\r\n\x1a\n", "another kind"),
        (png()[:30], "broken"),
        (noise[: len(noise) // 2], "broken"),
        (bomb(50_000, 50_000), "at most 262144 pixels. Found 50000 x 50000"),
        (bomb(2**32 - 1, 2**32 - 1), "at most 262144 pixels"),
        (bomb(0, 0), "at most 262144 pixels"),
        (bomb(512, 512, zlib.compress(bytes(500_000_000 // 50), 9)), ""),  # far more data than the header claims
        (bomb(8, 8, b"not zlib"), "broken"),
        (webp_canvas(16_000, 16_000), "Found 16000 x 16000"),
        (webp_canvas(8, 8), "broken"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(20), "another kind"),
        (b"GIF89a" + bytes(40), "another kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "another kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "another kind"),
        (
            b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(10**7))) + png()[8:],
            "another kind",
        ),
    ],
)
def test_pictures_that_are_none(url, data, cause):
    answer = http.post(url + REWARD, files=[metadata(["a", "b"]), image(data), image(png())])
    assert answer.status_code == 200
    rewards, errors = answer.json()["rewards"], answer.json()["errors"]
    assert rewards[1] < 0 and errors[1] is None
    if cause:
        assert rewards[0] is None and cause in errors[0]


def test_a_text_chunk_that_unpacks_without_end(url):
    data = png()
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(50_000_000), 9))
    answer = http.post(url + REWARD, files=[metadata(["a"]), image(data[:33] + text + data[33:])])
    assert answer.status_code == 200 and answer.json()["errors"][0] is not None


@pytest.mark.parametrize(
    ("data", "status"),
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
        (b'{"prompts": []}', 422),
        (b'{"prompts": "a"}', 422),
        (b'{"prompts": [1]}', 422),
        (b'{"prompts": ["a"], "more": 1}', 422),
        (b'{"prompts": ["a"], "columns": {"x": ["a", "b"]}}', 422),
        (b'{"prompts": ["a"], "columns": {"images": ["a"]}}', 422),
        (b'{"prompts": ["a"], "columns": {"self": ["a"]}}', 422),
        (b'{"prompts": ["a", "b"]}', 422),
        (json.dumps({"prompts": ["a" * 501]}).encode(), 413),
        (json.dumps({"prompts": ["a"] * 9}).encode(), 413),
        (json.dumps({"prompts": ["a" * 30_000]}).encode(), 413),
    ],
)
def test_metadata_that_is_none(url, data, status):
    answer = http.post(url + REWARD, files=[raw_metadata(data), image(png())])
    assert answer.status_code == status, answer.text
    assert len(answer.json()["detail"]) < 400


@pytest.mark.parametrize(
    ("shape", "size", "status"),
    [
        ([1, 3, 2, 2], 11, 422),
        ([1, 3, 2, 2], 13, 422),
        ([1, 4, 2, 2], 16, 422),
        ([1, 3, 0, 2], 0, 422),
        ([1, 3, -2, -2], 12, 422),
        ([2, 3, 2, 2], 24, 422),  # two images, one prompt
        ([1, 3, 2, 2, 1], 12, 422),
        ([1, 3, 2**40, 2**40], 12, 413),
        ([1, 3, 513, 512], 3 * 513 * 512, 413),
        ([1, 3, 2.5, 2], 12, 422),
        (["1", 3, 2, 2], 12, 422),
    ],
)
def test_tensors_that_are_none(url, shape, size, status):
    form = {"dtype": "uint8", "shape": shape}
    answer = http.post(url + REWARD, files=[metadata(["a"], tensor=form), image(bytes(size), "tensor")])
    assert answer.status_code == status, answer.text


def test_parts_that_do_not_belong(url):
    form = {"dtype": "uint8", "shape": [1, 3, 2, 2]}
    for files, status in [
        ([image(png())], 422),
        ([metadata(["a"]), metadata(["a"]), image(png())], 422),
        ([metadata(["a"]), image(png()), image(png())], 422),
        ([metadata(["a"]), image(png(), "more")], 422),
        ([metadata(["a"]), image(bytes(12), "tensor")], 422),
        ([metadata(["a"], tensor=form), image(png())], 422),
        ([metadata(["a"], tensor=form), image(bytes(12), "tensor"), image(png())], 422),
        ([metadata(["a"])] + [image(png())] * 50, 400),
    ]:
        assert http.post(url + REWARD, files=files).status_code == status
    fields = {"metadata": json.dumps({"prompts": ["a"]}), "images": "a plain field"}
    answer = http.post(url + REWARD, data=fields, files=[("metadata", ("x", b""))])
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data", b"--x--", 400),
        ("multipart/form-data; boundary=", b"--x--", 400),
        ("multipart/form-data; boundary=x", b"", 422),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 9_000, 400),
        ("multipart/form-data; boundary=x; charset=nothing", b"--x--\r\n", 422),
        ("application/json", b"{}", 415),
        ("", b"{}", 415),
        ("\x7f", b"{}", 415),
    ],
)
def test_multipart_that_is_none(url, kind, body, status):
    answer = http.post(url + REWARD, content=body, headers={"Content-Type": kind})
    assert answer.status_code in (status, 400, 422), answer.text
    assert answer.status_code != 500


def test_bodies_that_are_too_large(url):
    big = [metadata(["a"]), image(bytes(3_000_000))]
    assert http.post(url + REWARD, files=big).status_code == 413
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n{}\r\n\r\n"
    with connect(url) as connection:  # told beforehand: refused before a byte of it is read
        connection.sendall(head.format(REWARD, "Content-Length: 99999999999").encode())
        assert answer_line(connection).startswith(b"HTTP/1.1 413")
    with connect(url) as connection:  # not told: refused on the way
        connection.sendall(head.format(REWARD, "Transfer-Encoding: chunked").encode())
        piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        connection.sendall(b"6\r\n--x\r\n\r\n\r\n" + b"20\r\nContent-Disposition: form-data;n\r\n")
        try:
            for _ in range(40):
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert answer_line(connection)[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 400", b"")


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    return connection


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


def cut_off_after(connection, drip, limit=5.0):
    """Send `drip` again and again; the seconds until the server has had enough."""
    started = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - started < limit:
        try:
            connection.sendall(drip)
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
    return time.monotonic() - started


def test_slow_heads_are_cut_off(url):
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert 0.3 < cut_off_after(connection, b"X") < 2
    with connect(url) as silent:
        assert 0.3 < cut_off_after(silent, b"") < 2
    with connect(url) as again:  # the second request on a connection
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_line(again).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert 0.2 < cut_off_after(again, b"X") < 2


def test_slow_bodies_are_cut_off(url):
    with connect(url) as connection:
        connection.sendall(
            f"POST {REWARD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode()
        )
        started = time.monotonic()
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
        assert 0.3 < time.monotonic() - started < 3
        assert line.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400"))


def test_slow_clients_do_not_shut_others_out(url):
    slow = [connect(url) for _ in range(20)]
    try:
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert http.get(f"{url}/health").status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_more_connections_than_allowed(url):
    many = []
    try:
        for _ in range(200):
            many.append(connect(url))
        time.sleep(0.1)
        statuses = set()
        for _ in range(3):
            try:
                statuses.add(http.get(f"{url}/health").status_code)
            except httpx.TransportError:
                statuses.add(0)
        assert statuses <= {503, 0}  # told to come back, or cut off
    finally:
        for connection in many:
            connection.close()
    time.sleep(0.2)


def test_memory_of_all_requests_together_is_bounded(url):
    """Eight bodies of 1.9 MB under way where 8 MB are allowed: some are told to come back."""
    body = b"--x\r\nContent-Disposition: form-data; name=images; filename=a\r\n\r\n" + bytes(1_900_000)
    head = (
        f"POST {REWARD} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1999999\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    ).encode()
    connections = [connect(url) for _ in range(8)]
    lines = []
    try:
        for connection in connections:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(head + body)
        for connection in connections:
            lines.append(answer_line(connection)[:12])
    finally:
        for connection in connections:
            connection.close()
    assert lines.count(b"HTTP/1.1 503") >= 3
    assert set(lines) <= {b"HTTP/1.1 503", b"HTTP/1.1 408", b""}


async def flood(url, count, at_once):
    """`count` requests, `at_once` under way; the number of each answer."""
    gate, seen = asyncio.Semaphore(at_once), {}
    host, port = url.removeprefix("http://").split(":")
    request = httpx.Request("POST", url + REWARD, files=[metadata(["a"]), image(png())])
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


def test_bounded_server_options():
    server = make_server([JPEGCompressibilityReward()], limits=LIMITS)
    assert server.config.h11_max_incomplete_event_size == 16 * 1024
    assert server.config.http.header_timeout == 0.6 and server.config.http.max_connections == 64
