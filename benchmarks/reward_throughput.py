"""How fast rewards are: here or behind the server, one after another or side by side, waited for or overlapped.

    python benchmarks/reward_throughput.py [--smoke] [--out benchmarks/results]

Times depend on the machine; the ratios are what to compare. The rewards
are the OCR reward with its real weights, the JPEG reward, and one that costs nothing, which shows what the wire costs.
The rollout is stood in for by a pause as long as the rewards of a chunk take, since an accelerator
samples while the processor is free; the best ratio of overlapping `n` chunks is then `2 n / (n + 1)`.
"""

import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from _bench import arguments, machine, write
from PIL import Image, ImageDraw, ImageFont

from trl_apex.rewards import JPEGCompressibilityReward, OCRReward, RemoteReward, RewardScorer
from trl_apex.serving.server import serve

WORDS = ["CAT", "HOUSE", "TEN", "OCEAN", "LAKE", "STONE", "NEST", "CLOUD"]


def nothing(prompts: Sequence[str], **keywords: object) -> list[float]:
    """A reward that costs nothing."""
    return [0.0] * len(prompts)


def make_batch(count: int, side: int) -> tuple[list[str], torch.Tensor]:
    """Pictures of words on noise, and the prompts that ask for them."""
    random = np.random.default_rng(0)
    font = ImageFont.load_default(side // 5)
    prompts, pictures = [], []
    for i in range(count):
        image = Image.fromarray(random.integers(180, 256, (side, side, 3), dtype=np.uint8))
        ImageDraw.Draw(image).text((side // 10, side // 3), WORDS[i % len(WORDS)], fill="black", font=font)
        prompts.append(f'a sign with "{WORDS[i % len(WORDS)]}"')
        pictures.append(torch.from_numpy(np.array(image)))
    return prompts, torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def seconds(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each action, run in turns, so that what else the machine does falls on all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def start_server(rewards: dict[str, Callable]) -> tuple[multiprocessing.Process, str]:
    """A reward server in a process of its own, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, kwargs={"rewards": rewards, "port": port}, daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            RemoteReward(url, next(iter(rewards))).check()
            return process, url
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def local_rewards() -> dict[str, Callable]:
    return {"ocr": OCRReward(), "jpeg_compressibility": JPEGCompressibilityReward(), "nothing": nothing}


def local_and_remote(url: str, prompts: list[str], images: torch.Tensor, repeats: int) -> dict:
    """Images per second of each reward, here and behind the server, and whether the numbers are the same."""
    rows = {}
    for name, local in local_rewards().items():
        calls: dict[str, Callable] = {"local": lambda local=local: list(local(prompts=prompts, images=images))}
        for kind in ("float32", "uint8"):
            remote = RemoteReward(url, name, as_uint8=kind == "uint8")
            calls[f"remote_{kind}"] = lambda remote=remote: asyncio.run(_score(remote, prompts, images))
        times = seconds(calls, repeats)
        row: dict[str, float | bool] = {f"{key}_images_per_s": len(prompts) / took for key, took in times.items()}
        row |= {f"{key}_over_local": times["local"] / took for key, took in times.items() if key != "local"}
        first, *others = (call() for call in calls.values())
        row["same_numbers"] = all(scores == first for scores in others)
        rows[name] = row
    return rows


async def _score(remote: RemoteReward, prompts: list[str], images: torch.Tensor) -> list:
    return list(await remote(prompts=prompts, images=images))


def waited_and_overlapped(
    url: str, prompts: list[str], images: torch.Tensor, chunks: int, repeats: int, remote: bool
) -> dict:
    """A rollout in chunks, its rewards waited for after each chunk or fetched at the end."""
    if remote:
        rewards = [RemoteReward(url, "ocr"), RemoteReward(url, "jpeg_compressibility")]
    else:
        rewards = [OCRReward(workers=1), JPEGCompressibilityReward()]
    parts = torch.arange(len(prompts)).chunk(chunks)
    with RewardScorer(rewards) as scorer:

        def submit(part: torch.Tensor):
            chosen = [prompts[i] for i in part]
            return scorer.submit(prompts=chosen, completions=[], images=images[part])

        pause = seconds({"chunk": lambda: submit(parts[0]).result()}, repeats)["chunk"]

        def roll_out() -> None:
            time.sleep(pause)

        def waited() -> torch.Tensor:
            scored = []
            for part in parts:
                roll_out()
                scored.append(submit(part).result().rewards)
            return torch.cat(scored)

        def overlapped() -> torch.Tensor:
            futures = []
            for part in parts:
                roll_out()
                futures.append(submit(part))
            return torch.cat([future.result().rewards for future in futures])

        same = torch.equal(waited(), overlapped())
        times = seconds({"waited_s": waited, "overlapped_s": overlapped}, repeats)
    return times | {"speedup": times["waited_s"] / times["overlapped_s"], "same_numbers": same}


def side_by_side(prompts: list[str], repeats: int) -> dict:
    """Three rewards that wait 0.2 s for somebody else, called one after another and by the scorer."""

    async def waiting(prompts: list[str], **keywords: object) -> list[float]:
        await asyncio.sleep(0.2)
        return [0.0] * len(prompts)

    async def in_turn() -> None:
        for _ in range(3):
            await waiting(prompts=prompts)

    with RewardScorer([waiting] * 3, ["a", "b", "c"]) as scorer:
        calls = {
            "in_turn_s": lambda: asyncio.run(in_turn()),
            "together_s": lambda: scorer.submit(prompts=prompts, completions=[]).result(),
        }
        times = seconds(calls, repeats)
    return times | {"speedup": times["in_turn_s"] / times["together_s"]}


def main() -> None:
    """Measure, print and save."""
    given = arguments(
        __doc__,
        "two small images, once",
        images={"type": int, "default": 16},
        side={"type": int, "default": 128},
        chunks={"type": int, "default": 4},
        repeats={"type": int, "default": 3},
    ).parse_args()
    if given.smoke:
        given.images, given.side, given.chunks, given.repeats = 2, 64, 2, 1
    torch.set_num_threads(1)
    prompts, images = make_batch(given.images, given.side)
    process, url = start_server(local_rewards())
    try:
        results = {
            "settings": {name: getattr(given, name) for name in ("images", "side", "chunks", "repeats")},
            "machine": machine(),
            "local_and_remote": local_and_remote(url, prompts, images, given.repeats),
            "overlap_local": waited_and_overlapped(url, prompts, images, given.chunks, given.repeats, remote=False),
            "overlap_remote": waited_and_overlapped(url, prompts, images, given.chunks, given.repeats, remote=True),
            "side_by_side": side_by_side(prompts, given.repeats),
        }
    finally:
        process.terminate()
        process.join(timeout=20)
    write(given.out / "reward_throughput.json", results, digits=3)
    print((given.out / "reward_throughput.json").read_text())


if __name__ == "__main__":
    main()
