"""Compiled blocks: one graph for all batch sizes, and an error instead of code that is quietly not compiled."""

import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from trl_apex.trainers.weights import RECOMPILE_LIMIT, compile_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))
from families import build


@pytest.fixture
def dynamo():
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch._dynamo.reset()
        yield torch._dynamo.config
        torch._dynamo.reset()


def predict(denoiser, rows):
    inputs = torch.randn(rows, 16, 8, 8), torch.ones(rows), torch.randn(rows, 20, 32), torch.randn(rows, 32)
    names = "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"
    return denoiser(**dict(zip(names, inputs, strict=True)), return_dict=False)[0]


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_rollout_and_update_of_any_batch_size_share_their_graphs(dynamo):
    denoiser, counter = build("sd3.5-medium").transformer, CompileCounter()
    assert compile_blocks(denoiser, counter) == 2
    assert dynamo.recompile_limit == RECOMPILE_LIMIT and dynamo.fail_on_recompile_limit_hit
    graphs = []
    for rows in (2, 8, 5):
        with torch.no_grad():
            predict(denoiser.eval(), rows)
        predict(denoiser.train(), rows).sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [4, 4, 4]  # two kinds of block, with and without gradients


@pytest.mark.filterwarnings("ignore")
def test_too_many_graphs_are_an_error(dynamo):
    denoiser = build("sd3").transformer
    compile_blocks(denoiser, "eager")
    dynamo.recompile_limit = 1
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for rows in (2, 1):
            predict(denoiser, rows).sum().backward()
