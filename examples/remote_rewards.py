"""Rewards in another process or on another machine.

    python examples/remote_rewards.py serve --port 8000                  # terminal 1, or the machine with the spare GPU
    python examples/remote_rewards.py train --url http://127.0.0.1:8000  # terminal 2
    python examples/remote_rewards.py both                               # toy: the server in a thread of the trainer

`serve` does in Python what `trl-apex serve-rewards --reward jpeg_compressibility --reward examples.remote_rewards:contrast`
does on the command line. On an address other than loopback a token is required: set TRL_APEX_REWARD_TOKEN on both sides.
"""

import threading
import time
from argparse import ArgumentParser
from contextlib import contextmanager

from peft import LoraConfig

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.rewards import JPEGCompressibilityReward, RemoteReward
from trl_apex.serving.server import make_server, serve
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline


def contrast(prompts, images=None, completions=None, **columns):
    """Any reward function can be served."""
    if images is None:
        return [image.convert("L").getextrema()[1] / 255 for image in completions]
    return images.std((1, 2, 3)).tolist()


SERVED = [JPEGCompressibilityReward(), contrast]


@contextmanager
def server_in_a_thread():
    """A server on a free port of the loopback interface, for as long as the block runs."""
    server = make_server(SERVED, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The reward server must start. Found it stopped; its messages are above.")
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def train(url: str, max_steps: int, output_dir: str) -> APEXTrainer:
    trainer = APEXTrainer(
        model=load_tiny_pipeline(),
        reward_funcs=[RemoteReward(url, "jpeg_compressibility"), RemoteReward(url, "contrast")],
        args=APEXConfig(
            output_dir=output_dir,
            use_cpu=True,
            max_steps=max_steps,
            num_generations=8,
            generation_batch_size=32,
            per_device_train_batch_size=32,
            rollout_batch_size=16,  # the first half is scored by the server while the second is sampled
            num_inference_steps=6,
            sde_window_size=3,
            gradient_accumulation_steps=3,
            guidance_scale=1.0,
            max_sequence_length=12,  # tokens of a prompt; the default is for the full-size model
            epsilon=1e-3,
            reward_timeout=60.0,  # seconds; a slower answer is a missing score, never a made-up one
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=tiny_prompts("train", 32),
        peft_config=LoraConfig(r=8, lora_alpha=16),
    )
    trainer.train()
    return trainer


def main(arguments: list[str] | None = None) -> APEXTrainer | None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["serve", "train", "both"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--output_dir", default="runs/remote_rewards")
    options = parser.parse_args(arguments)
    if options.role == "serve":
        serve(SERVED, host=options.host, port=options.port)
        return None
    if options.role == "train":
        return train(options.url, options.max_steps, options.output_dir)
    with server_in_a_thread() as url:
        return train(url, options.max_steps, options.output_dir)


if __name__ == "__main__":
    main()
