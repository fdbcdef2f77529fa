"""All that touches private names of `trl.GRPOTrainer`.

`DiffusionGRPOTrainer` is a `trl.GRPOTrainer` whose own `__init__` never runs: it is about tokenizers, generation
configurations and vLLM. What the inherited methods read from it is set here, and `tests/trainers/test_trl_seam.py` reads
the syntax trees of these methods and names what a TRL release has added.
"""

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

# Methods of trl.GRPOTrainer that this package calls or leaves in place.
INHERITED = ("training_step", "compute_loss", "prediction_step", "log", "_log_metric", "_log_completion_extra")


def set_inherited_attributes(trainer: Any, args: Any, reward_funcs: list, reward_func_names: list[str]) -> None:
    """Set the attributes that inherited methods of `trl.GRPOTrainer` expect.

    Args:
        trainer (`trl.GRPOTrainer`): after `transformers.Trainer.__init__` has run.
        args (`trl.GRPOConfig`): its configuration.
        reward_funcs (`list`): K reward functions.
        reward_func_names (`list[str]`): their names.
    """
    trainer.reward_funcs = reward_funcs
    trainer.reward_func_names = reward_func_names
    trainer.reward_processing_classes = [None] * len(reward_funcs)
    trainer.num_generations = args.num_generations
    trainer.num_generations_eval = args.num_generations_eval or args.num_generations
    trainer.num_iterations = args.num_iterations
    trainer.shuffle_dataset = args.shuffle_dataset
    trainer.beta = args.beta
    trainer.epsilon_low = args.epsilon
    trainer.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    trainer.use_adaptive_entropy = False
    trainer.entropy_coef = 0.0
    trainer._last_world_entropy = None
    trainer.environments = None
    trainer.chat_template_kwargs = {}
    trainer.async_loop = None
    trainer.log_completions = args.log_completions
    if args.log_completions and trainer.accelerator.is_main_process:
        Path(args.output_dir, "completions").mkdir(parents=True, exist_ok=True)  # where `log` writes its tables
    trainer.log_unique_prompts = args.log_unique_prompts
    trainer.num_completions_to_print = args.num_completions_to_print
    trainer._step = 0
    trainer._buffered_inputs = None
    trainer._current_train_step_time = 0.0
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    size = args.generation_batch_size
    trainer._logs = {
        "images": deque(maxlen=size),
        "prompt": deque(maxlen=size),
        "completion": deque(maxlen=size),
        "rewards": defaultdict(lambda: deque(maxlen=size)),
        "advantages": deque(maxlen=size),
        "extra": defaultdict(lambda: deque(maxlen=size)),
    }
    trainer._pending_extra_logs = defaultdict(list)
    trainer._pending_metrics = defaultdict(list)
