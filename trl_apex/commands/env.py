"""`trl-apex env`: what a bug report should hold."""

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("trl_apex", "torch", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"),
    *("safetensors", "numpy", "pillow", "deepspeed", "torchjd", "rapidocr", "onnxruntime", "fastapi", "matplotlib"),
)
# Variables that change behaviour; of those that hold secrets only whether they are set.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
)
SECRETS = ("HF_TOKEN", "TRL_APEX_REWARD_TOKEN", "WANDB_API_KEY")


def run(arguments: list[str]) -> None:
    """Print versions, devices and the environment variables that matter."""
    argparse.ArgumentParser(prog="trl-apex env", description="Versions and devices, for bug reports.").parse_args(
        arguments
    )
    facts = {
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "platform": platform.platform(),
    }
    facts |= versions() | devices()
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    facts |= {name: "set" for name in SECRETS if os.environ.get(name)}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; optional ones may be missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """What there is to compute with."""
    free = shutil.disk_usage(".").free
    found = {"cpu": f"{os.cpu_count()} cores", "disk": f"{free / 1e9:.0f} GB free here"}
    try:
        import torch
    except ImportError:
        return found
    found["cuda"] = torch.version.cuda or "no"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return found
