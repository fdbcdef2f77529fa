"""A run that counts which prompts its text encoders were asked for."""

from diffusers import StableDiffusion3Pipeline
from training import make_trainer

from trl_apex.distributed import full_trainable_weights


def train_and_count(rank: int, output_dir: str, cache_dir: str | None):
    asked: list[str] = []
    original = StableDiffusion3Pipeline.encode_prompt

    def count(self, prompt, *args, **kwargs):
        asked.extend(prompt)
        return original(self, prompt, *args, **kwargs)

    StableDiffusion3Pipeline.encode_prompt = count
    trainer = make_trainer(output_dir, prompt_cache_dir=cache_dir, max_steps=1)
    before = list(asked)
    trainer.train()
    weights = {name: value.tolist() for name, value in full_trainable_weights(trainer.model).items()}
    return {
        "world": trainer.accelerator.num_processes,
        "before": before,
        "later": asked[len(before) :],
        "weights": weights,
    }
