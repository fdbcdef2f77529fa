"""What the tests of `accelerate launch` start: `launched.py FOLDER HOW` makes two updates with a reward that breaks so,
`launched.py EXAMPLE.py [ARGUMENTS]` runs an example, unchanged. Each rank leaves `rank{n}.json` in the output directory."""

import json
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("robustness", "diffusion")]
    from engines import on_cpu
    from faults import BreaksOnRank
    from training import engine_of, make_trainer, red

    first, *arguments = sys.argv[1:]
    if first.endswith(".py"):
        on_cpu()
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).parent))
        trainer = runpy.run_path(first)["main"](arguments)
    else:
        rewards = (red, BreaksOnRank(*arguments))
        trainer = make_trainer(first, rewards=rewards, save_strategy="steps", save_steps=1, baseline_prompts=0)
        trainer.train()
    result = {
        "world": trainer.accelerator.num_processes,
        "engine": engine_of(trainer),
        "step": trainer.state.global_step,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    rank = trainer.accelerator.process_index
    Path(trainer.args.output_dir, f"rank{rank}.json").write_text(json.dumps(result))
