"""Several processes share the work of encoding the prompts, and one folder of embeddings."""

from compare import largest_difference
from diffusers import StableDiffusion3Pipeline
from engines import environment
from processes import run
from training import PROMPTS, make_trainer, weights_of


def train_and_count(rank: int, output_dir: str, cache_dir: str | None):
    """A run that counts which prompts its text encoders were asked for."""
    asked: list[str] = []
    original = StableDiffusion3Pipeline.encode_prompt

    def count(self, prompt, *args, **kwargs):
        asked.extend(prompt)
        return original(self, prompt, *args, **kwargs)

    StableDiffusion3Pipeline.encode_prompt = count
    trainer = make_trainer(output_dir, prompt_cache_dir=cache_dir, max_steps=1)
    before = list(asked)
    trainer.train()
    return {
        "world": trainer.accelerator.num_processes,
        "before": before,
        "later": asked[len(before) :],
        "weights": weights_of(trainer),
    }


def test_each_process_encodes_its_share(tmp_path):
    def start(cache_dir):
        return run(train_and_count, 2, environment("ddp", 2), output_dir=str(tmp_path / "run"), cache_dir=cache_dir)

    first, second = start(str(tmp_path / "cache"))
    assert first["world"] == second["world"] == 2
    assert sorted(first["before"] + second["before"]) == sorted(set(PROMPTS))
    assert first["before"] and second["before"] and first["later"] == second["later"] == []
    again = start(str(tmp_path / "cache"))
    assert [rank["before"] + rank["later"] for rank in again] == [[], []]
    assert largest_difference(again[0]["weights"], first["weights"]) < 1e-7
