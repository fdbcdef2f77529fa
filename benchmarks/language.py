"""`APEXGRPOTrainer` on a small language model with three rewards of different difficulty, against TRL's two rules.

    python benchmarks/language.py --part scan        # learning rates, on the development seeds 0 and 100
    python benchmarks/language.py                    # ten other seeds with the chosen rates
    python benchmarks/language.py --smoke --out runs/smoke

A prompt is six different letters, an answer eight letters. The base model was trained for a moment on answers that repeat an
eighth of the prompt's letters and are random elsewhere. `vowels`, the number of vowels in the answer, is easy and has the
largest spread. `rising`, the share of neighbouring letters in alphabetical order, and `echo`, the share of the prompt's
letters that stand at their place in the answer, are harder and less spread. No answer is best in two of them. The plan is in
docs/benchmarks.md, "The rules on a language model".
"""

import json
import statistics
import tempfile
import time
from typing import Any

import torch
from _bench import arguments, machine, mean_and_error, table, write
from _tradeoff_run import DEVELOPMENT, QUICK
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, set_seed

from trl_apex import APEXGRPOConfig, APEXGRPOTrainer
from trl_apex.demo import quiet
from trl_apex.evaluation import hypervolume

LETTERS = "abcdefghijkl"
VOWELS = "ae"
ASKED, ANSWERED = 6, 8
SHARE = 1 / 8  # of the letters that the base model was taught to repeat
RULES: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex:quick": {"aggregation_options": QUICK},
    "apex:weak_need": {"need_coef": 1.0},
    "sum_then_normalize": {"multi_objective_aggregation": "sum_then_normalize"},
    "normalize_then_sum": {"multi_objective_aggregation": "normalize_then_sum"},
}
FRESH = range(1, 11)  # seeds; 6 to 10 were run once, when everything was settled
SCANNED = (1e-3, 3e-3)
CHOSEN = {  # by the scan
    "apex": 3e-3,
    "apex:quick": 3e-3,
    "apex:weak_need": 3e-3,
    "sum_then_normalize": 1e-3,
    "normalize_then_sum": 1e-3,
}

# 150 iterations of 16 prompts x 8 answers, one update each, all weights trained.
BUDGET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 150,
    "num_generations": 8,
    "per_device_train_batch_size": 128,
    "max_completion_length": ANSWERED,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

Row = dict[str, Any]


def vowels(completions, **kwargs):
    return [float(sum(text.count(letter) for letter in VOWELS)) for text in completions]


def rising(completions, **kwargs):
    answers = [text.split() for text in completions]
    return [sum(a < b for a, b in zip(answer, answer[1:], strict=False)) / (ANSWERED - 1) for answer in answers]


def echo(prompts, completions, **kwargs):
    pairs = [(prompt.split(), text.split()) for prompt, text in zip(prompts, completions, strict=True)]
    return [sum(a == b for a, b in zip(asked, answer, strict=False)) / ASKED for asked, answer in pairs]


REWARDS = (vowels, rising, echo)


def tokenizer_of_letters() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    letters = Tokenizer(WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts_of(count: int, generator: torch.Generator) -> list[str]:
    """Six different letters each."""
    drawn = torch.rand(count, len(LETTERS), generator=generator).argsort(1)[:, :ASKED]
    return [" ".join(LETTERS[i] for i in row) for row in drawn.tolist()]


def base_model(steps: int = 400) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers, trained on answers of which each letter of the prompt is right with probability `SHARE`."""
    set_seed(0)
    first = len(("<pad>", "<eos>", "<unk>"))
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=first + len(LETTERS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        asked = first + torch.rand(64, len(LETTERS)).argsort(1)[:, :ASKED]
        answer = torch.randint(first, first + len(LETTERS), (64, ANSWERED))
        answer[:, :ASKED] = torch.where(torch.rand(64, ASKED) < SHARE, asked, answer[:, :ASKED])
        tokens = torch.cat([asked, answer], 1)
        labels = torch.cat([torch.full_like(asked, -100), answer], 1)
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def scores(model: Any, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Rewards `[P, K]` of one sampled answer a prompt, always with the same random numbers."""
    tokens = tokenizer(prompts, return_tensors="pt")
    torch.manual_seed(1)
    answers = model.generate(**tokens, do_sample=True, max_new_tokens=ANSWERED)[:, tokens.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return torch.tensor([reward(prompts=prompts, completions=texts) for reward in REWARDS], dtype=torch.float64).T


def run(rule: str, rate: float, seed: int, **changes: Any) -> Row:
    """Train once; the gains over the base in standard deviations of its rewards over 512 unseen prompts."""
    quiet()
    generator = torch.Generator().manual_seed(seed)
    train, test = prompts_of(2048, generator), prompts_of(512, generator)
    model, tokenizer = base_model(), tokenizer_of_letters()
    before = scores(model, tokenizer, test)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "seed": seed, "learning_rate": rate, **BUDGET, **RULES[rule], **changes}
        trainer = APEXGRPOTrainer(
            model,
            list(REWARDS),
            APEXGRPOConfig(**settings),
            Dataset.from_dict({"prompt": train}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.process_time() - started
    gains = (scores(trainer.model.eval(), tokenizer, test).mean(0) - before.mean(0)) / before.std(0)
    history = trainer.state.log_history
    names = [reward.__name__ for reward in REWARDS]
    priorities = {name: [e[f"priority/{name}"] for e in history if f"priority/{name}" in e] for name in names}
    return {
        "method": rule,
        "rate": rate,
        "seed": seed,
        "gains": dict(zip(names, gains.tolist(), strict=True)),
        "worst_gain": gains.min().item(),
        "mean_gain": gains.mean().item(),
        "hypervolume": hypervolume(gains[None], torch.zeros(len(names), dtype=gains.dtype)),
        "priorities": priorities,
        "cpu_seconds": seconds,
    }


def summary(rows: list[Row]) -> str:
    """A line a rule and rate; differences to `apex` are paired by seed."""
    lines = []
    ours = {row["seed"]: row for row in rows if row["method"] == "apex"}
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["rate"]) == (method, rate)]
        pairs = [(ours[row["seed"]], row) for row in mine if row["seed"] in ours]
        measures = [[row[key] for row in mine] for key in ("worst_gain", "mean_gain", "hypervolume")]
        measures += [[row["gains"][reward.__name__] for row in mine] for reward in REWARDS]
        cells = ["{:+.2f} ± {:.2f}".format(*mean_and_error(values)) for values in measures]
        for key in ("worst_gain", "hypervolume"):
            other = "{:+.2f} ± {:.2f}".format(*mean_and_error([a[key] - b[key] for a, b in pairs])) if pairs else ""
            cells.append("" if method == "apex" else other)
        seconds = statistics.mean(row["cpu_seconds"] for row in mine)
        lines.append([f"`{method}`", f"{rate:g}", str(len(mine)), *cells, f"{seconds:.0f}"])
    head = ["rule", "rate", "seeds", "worst", "mean", "hypervolume", *(reward.__name__ for reward in REWARDS)]
    return table([*head, "`apex` − it, worst", "`apex` − it, hypervolume", "CPU-s"], lines, "---:") + "\n"


def main() -> None:
    given = arguments(
        __doc__,
        "one short run, to see that it works",
        part={"choices": ("scan", "compare"), "default": "compare"},
        redraw={"action": "store_true", "help": "only write the table again"},
    ).parse_args()
    torch.set_num_threads(1)
    path = given.out / ("language_scan.json" if given.part == "scan" else "language.json")
    if given.redraw:
        found = json.loads(path.read_text())
    else:
        jobs = [(rule, CHOSEN[rule], seed) for seed in FRESH for rule in RULES]
        changes: dict[str, Any] = {}
        if given.smoke:
            jobs, changes = [("apex", 1e-3, 0)], {"max_steps": 2}
        elif given.part == "scan":
            jobs = [(rule, rate, seed) for seed in DEVELOPMENT for rule in RULES for rate in SCANNED]
        rows = []
        for job in jobs:
            rows.append(run(*job, **changes))
            print(job, {name: round(gain, 2) for name, gain in rows[-1]["gains"].items()}, flush=True)
        found = {"machine": machine(), "budget": BUDGET, "methods": RULES, "rows": rows}
    write(path, found, summary(found["rows"]), digits=4)
    print(summary(found["rows"]))


if __name__ == "__main__":
    main()
