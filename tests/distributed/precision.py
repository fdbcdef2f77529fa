"""Training in bf16 as engines do it on GPUs, and what gets lost in it."""

from typing import Any

import torch
from training import engine_of, make_trainer, weights_of
from transformers import TrainerCallback, training_args


def make_bf16_trainer(output_dir: str, **options: Any):
    """The trainer of these tests; a CPU computes in bf16 too, slowly, which transformers does not allow."""
    training_args.is_torch_bf16_gpu_available = lambda: True
    return make_trainer(output_dir, bf16=True, **options)


def train_and_average(rank: int, output_dir: str, save: str, resume: str | None = None, **options: Any) -> dict:
    """Train and evaluate with a moving average; returns what the average should be, from the weights after each step."""
    trainer, seen = make_bf16_trainer(output_dir, eval_prompts=["red"], **options), []

    class Weights(TrainerCallback):
        def on_step_end(self, *arguments, **others):
            seen.append({name: weight.astype("float64") for name, weight in weights_of(trainer).items()})

    trainer.add_callback(Weights())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(save)
    exact, decay = dict(seen[0]), trainer.args.ema_decay
    for weights in seen[1:]:
        exact = {name: decay * exact[name] + (1 - decay) * weight for name, weight in weights.items()}
    return {"engine": engine_of(trainer), "exact": exact, "first": seen[0], "last": seen[-1]}


def distance_to_the_reference(rank: int, output_dir: str, **options: Any) -> dict[str, Any]:
    """How far an untrained model's predictions are from those of its frozen copy, and the dtype of its timesteps."""
    trainer = make_bf16_trainer(output_dir, lora=False, beta=0.01, max_steps=1, **options)
    rollout, found = trainer._generate_and_score_completions, {"told": set()}

    def generate(inputs):
        result, denoiser = rollout(inputs), trainer.policy.denoiser
        forward = denoiser.forward

        def told(*arguments, **keywords):
            timesteps = keywords["timestep"] if "timestep" in keywords else arguments[1]
            found["told"].add(str(timesteps.dtype))
            return forward(*arguments, **keywords)

        denoiser.forward = told
        pairs = torch.cartesian_prod(torch.arange(len(result["prompts"])), torch.arange(trainer.args.rows_per_image))
        with trainer._rollout_weights():
            own = trainer._predict_rows(trainer._rollout_model(), result, pairs)
        denoiser.forward = forward
        reference = result["reference"].flatten(0, 1)
        found["distance"] = float((own - reference).norm() / reference.norm())
        return result

    trainer._generate_and_score_completions = generate
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"engine": engine_of(trainer), "kl": logged[0]["kl"], **found}
