"""Runs an example, unchanged, under `accelerate launch` on the CPU: `launched_example.py EXAMPLE.py [ARGUMENTS]`."""

import json
import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    from engines import on_cpu

    on_cpu()
    example, *arguments = sys.argv[1:]
    sys.argv = [example, *arguments]
    sys.path.insert(0, str(Path(example).parent))
    main = runpy.run_path(example)["main"]
    trainer = main(arguments)

    from training import engine_of

    rank = trainer.accelerator.process_index
    result = {
        "world": trainer.accelerator.num_processes,
        "engine": engine_of(trainer),
        "step": trainer.state.global_step,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    Path(trainer.args.output_dir, f"rank{rank}.json").write_text(json.dumps(result))
