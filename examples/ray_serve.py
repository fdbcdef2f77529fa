"""The reward server under Ray Serve: replicas on several GPUs or machines behind one address.

In an environment with `ray[serve]` and this package with the extra `server`, on the head of a Ray cluster or on one machine:

    export TRL_APEX_REWARD_TOKEN=...   # at least 16 characters
    REWARDS='pickscore;ocr' REPLICAS=2 GPUS=1 serve run examples.ray_serve:rewards

and in the training script `RemoteReward("http://HEAD:8000", "pickscore")`.
"""

import os

from ray import serve

from trl_apex.serving.server import build_app, read_token

REWARDS = os.environ.get("REWARDS", "jpeg_compressibility").split(";")
OPTIONS = {"num_cpus": 1, "num_gpus": float(os.environ.get("GPUS", 0))}


def app():
    """The server of one replica; the token is that of the replica's own environment."""
    return build_app(REWARDS, read_token())


@serve.deployment(num_replicas=int(os.environ.get("REPLICAS", 1)), ray_actor_options=OPTIONS, max_ongoing_requests=64)
@serve.ingress(app)
class RewardServer:
    """A replica."""


rewards = RewardServer.bind()
