"""The script of the tests of `accelerate launch`: two updates, on two processes."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    from faults import BreaksOnRank
    from training import engine_of, make_trainer, red

    folder, how = sys.argv[1:]
    trainer = make_trainer(folder, rewards=(red, BreaksOnRank(how)), save_strategy="steps", save_steps=1)
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "world": trainer.accelerator.num_processes,
            "engine": engine_of(trainer),
            "step": trainer.state.global_step,
            "logs": logs,
        }
        Path(folder, "result.json").write_text(json.dumps(result))
