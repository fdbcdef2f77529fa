"""What the processes of a test have imported before they are forked."""

import gc
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")

import torch  # noqa: E402

torch.set_num_threads(1)

import deepspeed.module_inject  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402
import deepspeed.runtime.zero.stage3  # noqa: E402
import deepspeed.runtime.zero.stage_1_and_2  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402
import training  # noqa: E402, F401

gc.freeze()  # half a million objects that no rank needs to look through again
