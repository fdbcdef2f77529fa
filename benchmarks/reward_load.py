"""Eight trainers' clients at once against one reward server whose reward takes 1.5 s a call.

    python benchmarks/reward_load.py [--smoke] [--out benchmarks/results]

The server is a process of its own; the clients are eight scorers in one process,
which send float tensors as a trainer does. What must hold: every reward arrives, nothing counts as failed, and the
server's memory is bounded. `pixels` reads PIL images, `floats` asks for the float tensor too, which costs the server
four bytes a number for the 64 images of a call.
"""

import json
import time
from collections.abc import Sequence

import psutil
import torch
from _bench import arguments, write
from PIL import Image
from reward_throughput import start_server

from trl_apex.rewards import RemoteReward, RewardScorer

SECONDS = 1.5
CLIENTS = 8


def pixels(completions: Sequence[Image.Image], prompts: Sequence[str], completion_ids: None) -> list[float]:
    """The first pixel of each image, after 1.5 s."""
    time.sleep(SECONDS)
    return [float(image.getpixel((0, 0))[0]) for image in completions]  # type: ignore[index]


def floats(images: torch.Tensor, **keywords: object) -> list[float]:
    """The same, read from the float tensor."""
    time.sleep(SECONDS)
    return (images[:, 0, 0, 0] * 255).tolist()


def load(name: str, count: int, side: int) -> dict[str, float | int | str]:
    """Eight clients send `count` images of `side` pixels each at once; what arrived, and what the server held."""
    process, url = start_server({"pixels": pixels, "floats": floats})
    server = psutil.Process(process.pid)
    idle = peak = server.memory_info().rss
    images = torch.zeros(count, 3, side, side)
    values = torch.arange(count, dtype=torch.float32) % 256
    images[:, 0, 0, 0] = values / 255
    scorers = [RewardScorer([RemoteReward(url, name, as_uint8=True)]) for _ in range(CLIENTS)]
    started = time.perf_counter()
    futures = [s.submit(prompts=["a cat"] * count, completions=[None] * count, images=images) for s in scorers]
    while not all(future.done() for future in futures):
        peak = max(peak, server.memory_info().rss)
        time.sleep(0.02)
    took, cpu = time.perf_counter() - started, sum(server.cpu_times()[:2])
    scored = [future.result() for future in futures]
    arrived = sum(int((s.rewards[:, 0] - values).abs().lt(1e-3).sum()) for s in scored)
    for scorer in scorers:
        scorer.close()
    process.terminate()
    process.join(timeout=20)
    calls = -(-CLIENTS * count // 64)
    return {
        "reward": name,
        "images_per_client": count,
        "side": side,
        "arrived": arrived,
        "of": CLIENTS * count,
        "failed": sum(s.failures[name] for s in scored),
        "seconds": round(took, 1),
        "seconds_at_best": calls * SECONDS,
        "server_cpu_seconds": round(cpu, 1),
        "server_idle_MB": idle // 10**6,
        "server_peak_MB": peak // 10**6,
    }


def main() -> None:
    given = arguments(__doc__, "two small images of every client").parse_args()
    torch.set_num_threads(1)
    sizes = [(2, 64)] if given.smoke else [(144, 512), (64, 1024)]
    rows = []
    for name in ("pixels", "floats"):
        for count, side in sizes:
            rows.append(load(name, count, side))
            print(json.dumps(rows[-1]), flush=True)
    write(given.out / "reward_load.json", {"rows": rows})


if __name__ == "__main__":
    main()
