"""APEX on a language model: `trl.GRPOTrainer` with two rewards that pull in opposite directions.

    python examples/language_model.py                      # a tiny Qwen2 made on the spot, on a CPU
    python examples/language_model.py --multi_objective_aggregation sum_then_normalize   # what a plain sum does
    accelerate launch examples/language_model.py --model Qwen/Qwen3-0.6B --max_completion_length 64 --use_cpu false

Every option of `trl.GRPOConfig` and of the aggregator is a flag. Completions can use one word or the other: of two rewards,
one a thousand times as loud as the other, a sum follows the loud one and drops the quiet one to nothing.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import TrlParser

from trl_apex import APEXGRPOConfig, APEXGRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", "say", "something", "sun", "moon", "sea", "wind", "stone"]


@dataclass
class ScriptArguments:
    """What the trainer's configuration does not hold."""

    model: str = field(default="tiny", metadata={"help": "Hub id or folder of a causal language model, or 'tiny'."})


def loud_sun(completions, **kwargs):
    return [10.0 * text.lower().count("sun") / 8 for text in completions]


def quiet_moon(completions, **kwargs):
    return [0.01 * text.lower().count("moon") / 8 for text in completions]


def tiny_model() -> tuple[Any, Any]:
    """A Qwen2 of 21 thousand parameters and its tokenizer, with random weights and no download."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    set_seed(0)
    return Qwen2ForCausalLM(config), tokenizer


DEFAULTS = {
    "output_dir": "runs/language_model",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 60,
    "num_generations": 8,
    "generation_batch_size": 32,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}


def main(arguments: list[str] | None = None) -> APEXGRPOTrainer:
    parser = TrlParser((ScriptArguments, APEXGRPOConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    script, args = parser.parse_args_and_config(arguments)
    model, tokenizer = tiny_model() if script.model == "tiny" else (script.model, None)
    trainer = APEXGRPOTrainer(
        model=model,
        reward_funcs=[loud_sun, quiet_moon],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["say something", "say"] * 16}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    for name in trainer.reward_func_names:
        means = [row[f"rewards/{name}/mean"] for row in trainer.state.log_history if f"rewards/{name}/mean" in row]
        print(f"{name}: {means[0]:.4g} -> {means[-1]:.4g}")
    return trainer


if __name__ == "__main__":
    main()
