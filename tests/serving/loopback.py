"""A reward server on loopback, in a thread of the test's own process."""

import threading
import time
from contextlib import contextmanager

import httpx

from trl_apex.serving.server import make_server

TOKEN = "a-token-of-some-length"
# One client, since making one costs more than a request; a connection each, as the servers come and go.
http = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=20)


@contextmanager
def running(rewards, **options):
    """Serve `rewards` on a free port; yields the address."""
    server = make_server(rewards, port=0, **options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


def wait_for(url, status, process=None):
    """Wait until the server at `url`, perhaps a process of its own, is in this state."""
    deadline = time.monotonic() + 60
    while (found := status_of(url)) != status:
        assert time.monotonic() < deadline and (process is None or process.poll() is None), found
        time.sleep(0.02)


def status_of(url):
    try:
        return http.get(f"{url}/health").json()["status"]
    except httpx.TransportError:
        return "away"
