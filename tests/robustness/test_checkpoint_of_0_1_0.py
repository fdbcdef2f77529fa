"""A checkpoint that version 0.1.0 wrote goes on under this version, to where 0.1.0 itself went."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_runs import tiny_pipeline, tiny_trainer

KEPT = Path(__file__).parent / "checkpoint-0.1.0"


def test_a_checkpoint_of_0_1_0_resumes_to_the_weights_of_0_1_0(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(KEPT / "checkpoint-2", run / "checkpoint-2")
    with pytest.warns(FutureWarning, match="scale_blend"):
        trainer = tiny_trainer(
            run,
            evaluate=True,
            pipeline=tiny_pipeline(blocks=4),
            lora=LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]),
            # The script of 0.1.0, its flat options included.
            ema_decay=0.9,
            ema_update_steps=1,
            sde_window_size=1,
            beta=0.01,
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
            need_coef=2.0,
            scale_blend=0.5,
            gradient_probe=True,
            probe_every=1,
            lr_scheduler_type="cosine",
        )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=True)

    assert trainer.state.global_step == 4
    wanted = load_file(KEPT / "adapter-at-step-4.safetensors")
    found = get_peft_model_state_dict(trainer.model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    assert any(
        (p.detach() - start[name]).abs().max() > 1e-3 for name, p in trainer.model.named_parameters() if name in start
    )
    old = json.loads((KEPT / "aggregator-at-step-4.json").read_text())
    new = trainer.aggregator.state_dict()
    torch.testing.assert_close(
        torch.tensor(new["priorities"], dtype=torch.float64),
        torch.tensor(old["priorities"], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
