"""The command line `trl-apex`. Heavy packages are imported inside the commands, so `--help` is quick."""

import argparse
import dataclasses
import difflib
import logging
import os
import re
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from .redact import redacted
from .rewards.registry import REWARDS, load_rewards

COMMANDS = {
    "demo": "train the tiny pipeline that comes with the package, on a CPU, in minutes",
    "train": "train a text-to-image model on several rewards",
    "evaluate": "compare tuned models with their base on the same prompts and noise",
    "report": "write the HTML report of one run, or of several side by side",
    "rewards": "list the built-in rewards with range, memory, licence and the extra that they need",
    "serve-rewards": "serve reward functions to trainers over HTTP",
    "push": "upload a run to the Hugging Face Hub",
    "plan": "estimate the memory and the hours of a training configuration before it runs",
    "env": "print versions and devices, for bug reports",
}
HELP = {  # of options that several commands have
    "model": "hub id or folder of a diffusers pipeline, or 'tiny'",
    "dataset": "prompts: .json, .jsonl, .csv, .parquet or .txt file, folder, hub id, or 'tiny'",
    "prompt_column": "column that holds the prompts",
    "max_prompts": "use only the first MAX_PROMPTS prompts",
    "rewards": "a name (ocr, pickscore, ...), a call such as 'deqa(model=\"path\")', or module:attribute",
    "monitors": "rewards to report and not to train on",
    "run_dir": "the output_dir of a training run",
    "size": "pixels; default: 512 for SD3 and FLUX, else the model's own",
}
USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130

logger = logging.getLogger(__name__)


# The program


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name), by default that of this process.

    The exit code is 0, 2 for a mistake of the user, 1 for another failure, or 130 if interrupted.
    """
    for name in ("transformers.utils.import_utils", "DeepSpeed"):
        logging.getLogger(name).addFilter(_is_no_start_up_line)
    given, traceback = _take_traceback_flag(sys.argv[1:] if arguments is None else list(arguments))
    parser = build_parser()
    if not given or given[0] == "help":
        parser.print_help()
        return 0 if given else USER_MISTAKE
    command = given[0]
    if not command.startswith("-") and command not in COMMANDS:
        return _fail("trl-apex", f"no command {command!r}. {_hint_at_command(command)}", USER_MISTAKE)
    try:
        parsed, rest = parser.parse_known_args([_with_hyphens(argument) for argument in given])
        options = vars(parsed)
        if options.pop("help_all", False):
            print(all_options())
        elif command in ("train", "plan"):  # they also take every field of APEXConfig; `train` records them as typed
            options.pop("run")(rest=given[1:] if command == "train" else rest, **options)
        elif rest:
            return _fail(f"trl-apex {command}", f"unrecognized arguments: {' '.join(rest)}", USER_MISTAKE)
        else:
            options.pop("run")(**options)
        return 0
    except Exception as error:
        if traceback:
            raise
        return _fail(f"trl-apex {command}", *explain(error))
    except KeyboardInterrupt as stop:
        return _fail(f"trl-apex {command}", f"interrupted{str(stop) or '.'}", INTERRUPTED)
    except SystemExit as stop:  # argparse, after --help or a wrong flag
        return stop.code if isinstance(stop.code, int) else USER_MISTAKE


def explain(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code.

    A ValueError or ImportError of this package is written for users and is shown as it is. Any other error gets its
    class's name and the hint at `--traceback`.

    Example:
        >>> explain(FileNotFoundError(2, "No such file", "run.yaml"))
        ('No such file: run.yaml', 2)
        >>> explain(KeyError("x"))
        ("KeyError: 'x'. Run it again with --traceback to see where.", 1)
    """
    text = " ".join(str(error).split())
    if hasattr(error, "exit_code"):  # of this package, with a message that says everything
        return text, error.exit_code
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return text if not error.filename else f"{error.strerror}: {error.filename}", USER_MISTAKE
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    raised_here = bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("trl_apex.")
    if isinstance(error, ValueError | ImportError) and raised_here:
        return text, USER_MISTAKE
    if type(error) is RuntimeError and text.startswith("Training was stopped"):
        return text, FAILURE
    end = "" if text.endswith((".", "!", "?")) else "."
    return f"{type(error).__name__}: {text}{end} Run it again with --traceback to see where.", FAILURE


def _is_no_start_up_line(record: logging.LogRecord) -> bool:
    """False for what libraries say of packages and devices that a command does not need."""
    return not re.search("requires torchvision|Setting accelerator to CPU", record.getMessage())


def _fail(program: str, message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0" or code == FAILURE:
        print(f"{program}: {'' if code == INTERRUPTED else 'error: '}{redacted(message)}", file=sys.stderr)
    return code


def _hint_at_command(command: str) -> str:
    if command == "benchmark":  # until 0.1.0
        return "Benchmarks are scripts of the repository: python benchmarks/NAME.py."
    close = difflib.get_close_matches(command, COMMANDS, 1)
    return f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(COMMANDS)}."


def _with_hyphens(argument: str) -> str:
    """`--output_dir` and `--output-dir` are one option."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", name) else argument


def _take_traceback_flag(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--traceback` (in 0.1.0 `--debug`), and whether it was there."""
    kept: list[str] = []
    for argument, following in pairwise([*arguments, ""]):
        transformers_own = following in ("underflow_overflow", "tpu_metrics_debug")  # its `--debug` takes a value
        if argument == "--debug" and not transformers_own:
            warnings.warn("`--debug` is now called `--traceback`. Use that name.", FutureWarning, stacklevel=2)
        elif argument != "--traceback":
            kept.append(argument)
    return kept, len(kept) < len(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Options of `train` that are fields of [`APEXConfig`] are read by [`train_options`]."""
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="trl-apex",
        description="Multi-reward fine-tuning of text-to-image models.",
        epilog="`trl-apex COMMAND --help` shows the options of a command; `_` and `-` are the same in their names. "
        "`--traceback` shows where an error comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"trl_apex {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., None], description: str = "", **keywords: Any) -> Callable[..., None]:
        """Add a command; returns `add_argument` with the type from the default, and the help from `HELP`."""
        added = commands.add_parser(name, help=COMMANDS[name], description=description or COMMANDS[name], **keywords)
        added.set_defaults(run=run)

        def option(*names: str, **keywords: Any) -> None:
            default = keywords.get("default")
            text = keywords.pop("help", HELP.get(names[-1].lstrip("-").replace("-", "_"), ""))
            if isinstance(default, int | float | Path):
                keywords["type"] = type(default)
            if default not in (None, "", []):
                text = f"{text}; default: {default}".lstrip("; ")
            added.add_argument(*names, help=text, **keywords)

        return option

    option = command("demo", _demo)
    option("--output-dir", default=Path("runs/demo"))
    option("--seed", default=0)
    option("--quick", action="store_true", help="fewer updates and test prompts: about a minute, and smaller gains")

    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    usage = "trl-apex {} --config FILE.yaml [--OPTION VALUE ...]"
    option = command("train", _train, TRAIN_HELP, usage=usage.format("train"), **raw)
    option("--help-all", action="store_true", help="show all options with their defaults")

    option = command("plan", _plan, PLAN_HELP, usage=usage.format("plan"), **raw)
    option("--help-all", action="store_true", help="show all options of a configuration with their defaults")
    option("--gpus", default=1, help="GPUs; generation_batch_size counts the images of all of them")
    option("--zero-stage", default=0, help="of DeepSpeed, 0 to 3; 0 for none")
    option("--gpu-memory-gb", type=float, help="of one GPU; a plan that does not fit is an error with a remedy")
    option("--num-prompts", default=0, dest="prompts", help="distinct prompts, for the size of their embeddings")
    option("--rewards-gb", type=float, help="of reward networks on each GPU; by default from the rewards' names")
    option("--gpu-tflops", default=989.0, help="half-precision peak of one GPU: RTX 4090 165, A100 312, H100 989")
    option("--utilization", default=0.3, help="share of that peak which a run reaches, assumed")
    option("--iteration-seconds", type=float, help="measured time of one iteration, instead of both")

    text = (
        "Compares tuned models with their base on the same prompts and noise. Options that are left out are those of the "
        "run, from its config.json; a hub id has none, and needs --model, --dataset and --rewards."
    )
    option = command("evaluate", _evaluate, text)
    option("adapters", nargs="+", metavar="RUN_DIR", help="run directory, or hub id of an adapter")
    option("--model")
    option("--dataset", dest="prompts")
    option("--split", help="part of the dataset, 'test' if the run names none")
    option("--prompt-column")
    option("--max-prompts", type=int)
    option("--rewards", nargs="+", metavar="REWARD")
    option("--monitors", nargs="+", metavar="REWARD")
    option("--steps", type=int, dest="num_inference_steps", help="denoising steps; 40 for a hub id")
    option("--guidance-scale", type=float, help="1 for none; 4.5 for a hub id")
    option("--negative-prompt")
    option("--height", type=int, help="pixels")
    option("--width", type=int, help="pixels")
    option("--max-sequence-length", type=int, help="text tokens; 256 for a hub id")
    option("--images-per-prompt", default=1)
    option("--batch-size", default=8, help="images sampled at a time")
    option("--seed", type=int, help="of the noise")
    option("--ema", action="store_true", help="the averaged weights of a run of version 0.1.0; later ones save them")
    option("--output-dir", help="default: RUN_DIR, or evaluation/ for several")

    option = command("report", _report)
    option("run_dirs", nargs="+", metavar="RUN_DIR", help=HELP["run_dir"])
    option("-o", "--output", help="default: report.html in the run directory, or beside the first of several")
    option("--figures", action="store_true", help="write PNG figures into RUN_DIR/figures as well")

    text = (
        "Uploads adapter, aggregator state, model card, samples and report of a run in one commit. The token is that of "
        "`hf auth login`, or HF_TOKEN."
    )
    option = command("push", _push, text)
    option("run_dir", metavar="RUN_DIR")
    option("--repo-id", required=True, metavar="USER/NAME", help="repository; created if it is missing")
    option("--private", action=argparse.BooleanOptionalAction, help="visibility of a new repository")
    option("--revision", help="branch to commit to")
    option("--no-create", action="store_false", dest="create", help="fail if the repository does not exist")
    option("--message", default="Upload run", dest="commit_message", help="commit message")

    text = (
        "Serves reward functions over HTTP. The token is read from a file or from TRL_APEX_REWARD_TOKEN, never from the "
        "command line, where other users could see it."
    )
    option = command("serve-rewards", _serve_rewards, text)
    several = f"{HELP['rewards']}; may be repeated"
    option("-r", "--reward", action="append", default=[], metavar="REWARD", help=several)
    option("--env", help="serve from a virtual environment, which is made first: 'deqa', or a requirements file")
    option("--parent", type=int, help=argparse.SUPPRESS)  # the process to end with
    option("--host", default="127.0.0.1", help="other than loopback needs a token")
    option("--port", default=8000)
    option("--token-file", help="a file that holds the bearer token")
    option("--ssl-certfile", help="a certificate, to serve https instead of http")
    option("--ssl-keyfile", help="the certificate's key")

    command("rewards", _rewards)
    command("env", _env)
    return parser


# train

TRAIN_HELP = f"""Trains a text-to-image model on several rewards. A YAML file holds options by name; those of the command line win.

what to train
  --model NAME                  {HELP["model"]}
  --dataset NAME                {HELP["dataset"]}
  --rewards NAME [NAME ...]     names that `trl-apex rewards` lists, 'name(key=value)' or module:attribute
  --reward_weights W [W ...]    your weight for each reward; equal if left out
  --output_dir DIR              checkpoints, adapter, logs and report go here
  --lora_r N                    rank of the adapter; 0 trains all weights
  --adapter DIR|NAME            run folder or hub id of an adapter to go on from

sampling
  --height N, --width N         pixels
  --num_generations N           images of one prompt, which are compared with each other
  --generation_batch_size N     images of one iteration, on all devices together
  --rollout_batch_size N        images sampled at a time on one device
  --num_inference_steps N       denoising steps
  --sde_window_size N           how many of these are trained
  --guidance_scale X            1 for none

updates
  --max_steps N                 optimizer steps
  --per_device_train_batch_size N
                                images in one forward pass of an update
  --updates_per_iteration N     optimizer steps for each iteration's images
  --learning_rate X             of AdamW
  --loss_type NAME              grpo, awm, nft or fpo
  --gradient_checkpointing false
                                saves time, costs memory
  --use_cpu true                train on the CPU

evaluation and saving
  --eval_dataset NAME           prompts to evaluate on, as --dataset: once at the end, or with
  --eval_strategy steps, --eval_steps N
                                every N optimizer steps
  --monitors NAME [NAME ...]    {HELP["monitors"]}
  --save_steps N                optimizer steps between two checkpoints
  --resume_from_checkpoint true|DIR
                                continue an interrupted run
  --push_to_hub true, --hub_model_id USER/NAME

Ctrl-C finishes the iteration and saves a checkpoint; a second Ctrl-C stops at once.
On several devices: accelerate launch -m trl_apex train --config FILE.yaml"""


def _field(default: Any, text: str) -> Any:
    keywords: dict[str, Any] = {"default_factory": list} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": f"{text[0].upper()}{text[1:]}."}, **keywords)


@dataclass
class TrainArguments:
    """Model, prompts, rewards and adapter: what `trl-apex train` takes beside the fields of [`APEXConfig`]."""

    model: str | None = _field(None, HELP["model"])
    revision: str | None = _field(None, "branch, tag or commit of a hub id")

    dataset: str | None = _field(None, HELP["dataset"])
    dataset_config: str | None = _field(None, "configuration of a hub dataset")
    dataset_split: str = _field("train", "split to train on")
    prompt_column: str = _field("prompt", HELP["prompt_column"])
    max_prompts: int | None = _field(None, HELP["max_prompts"])
    eval_dataset: str | None = _field(None, "prompts to evaluate on, as `dataset`; without `eval_strategy` at the end")
    eval_split: str = _field("test", "split to evaluate on")

    rewards: list[str] = _field([], f"each {HELP['rewards']}")
    monitors: list[str] = _field([], HELP["monitors"])

    lora_r: int = _field(32, "rank of the LoRA adapter; 0 trains all weights instead")
    lora_alpha: int | None = _field(None, "scale of the adapter; None for twice the rank")
    lora_target_modules: list[str] | None = _field(None, "layers to adapt; None for the family's attention layers")
    use_rslora: bool = _field(False, "scale by alpha / sqrt(r) instead of alpha / r")
    adapter: str | None = _field(None, "run folder or hub id of an adapter to go on from; its own rank and scale hold")


def train_options(
    arguments: Sequence[str], required: Sequence[str] = (), on_gpu: bool = False
) -> tuple[TrainArguments, Any]:
    """[`TrainArguments`] and [`APEXConfig`] from the flags of `trl-apex train` and the YAML file of `--config`.

    The `required` options must have a value. `on_gpu` reads them as on a machine with a GPU, if there is none here.
    """
    import torch
    from transformers import HfArgumentParser

    from .trainers.config import APEXConfig

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message[0].upper()}{message[1:]}. `trl-apex train --help-all` lists all options.")

    parser = Parser([TrainArguments, APEXConfig], prog="trl-apex train", allow_abbrev=False)
    parser.add_argument("--config")
    known = _names(TrainArguments) | _names(APEXConfig)
    file = parser.parse_known_args(arguments)[0].config
    settings = _read_yaml(file) if file else {}
    os.environ.update({key: str(value) for key, value in (settings.pop("env", None) or {}).items()})
    for name in {"rewards", "monitors", "lora_target_modules"} & settings.keys():
        if settings[name] is None:  # a key with nothing under it
            del settings[name]
        elif isinstance(settings[name], str):  # one of them may stand without a list
            settings[name] = [settings[name]]
    parser.set_defaults(**settings)
    values, more = parser.parse_known_args(arguments)
    unknown = [key for key in settings if key not in known]
    unknown += [part.split("=")[0] for part in more if part.startswith("-")] or more
    if unknown:
        if unknown == more and not more[0].startswith("-"):
            raise ValueError(f"Every option must have a name. Found {more[0]}. Pass a YAML file as --config FILE.")
        close = [difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, 1) for name in unknown]
        hints = [f"{a} (did you mean {b[0]}?)" if b else a for a, b in zip(unknown, close, strict=True)]
        raise ValueError(f"Every option must be known. Found {'; '.join(hints)}.")
    for name in required:
        if not getattr(values, name):
            raise ValueError(f"`{name}` must be given. Found nothing. Pass --{name}, or set it in the YAML file.")
    if not values.use_cpu and not torch.accelerator.is_available():
        if not on_gpu and values.model != "tiny":
            raise ValueError(
                "Training needs a GPU, or `use_cpu`. Found no GPU. Pass --use_cpu true to train on the CPU."
            )
        values.use_cpu = True
        if on_gpu and values.bf16 is None and not values.fp16:
            values.bf16 = True
    try:
        config = APEXConfig(**{name: value for name, value in vars(values).items() if name in _names(APEXConfig)})
    except ValueError as error:  # of TRL's and transformers' own checks: the user's mistake as well
        raise ValueError(str(error)) from error
    return TrainArguments(**{name: getattr(values, name) for name in _names(TrainArguments)}), config


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} must be valid YAML. Found: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("env") or {}, dict):
        raise ValueError(
            f"The configuration {path}, and its key `env`, must hold options as `name: value`. "
            f"Found {type(content).__name__}."
        )
    return {str(key): value for key, value in content.items()}


def all_options() -> str:
    """What `trl-apex train --help-all` prints: every option with its default, those of this package first."""
    lines = ["usage: trl-apex train --config FILE.yaml [--OPTION VALUE ...]"]
    for title, options in option_groups().items():
        lines += ["", title]
        for name, (default, text) in options.items():
            lines.append(f"  --{name} ({'empty' if default in ('', [], {}) else default})")
            lines += textwrap.wrap(text, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def option_groups() -> dict[str, dict[str, tuple[Any, str]]]:
    """Default and help of every option of `train` by name, in groups, those of this package first."""
    from transformers import TrainingArguments
    from trl import GRPOConfig

    from .trainers.config import REFUSED_FIELDS, APEXConfig, DiffusionGRPOConfig, default_of

    left = {f.name: f for cls in (APEXConfig, TrainArguments) for f in dataclasses.fields(cls) if f.init}
    groups: dict[str, dict[str, tuple[Any, str]]] = {}
    for title, cls in {
        "From transformers' TrainingArguments": TrainingArguments,
        "From TRL's GRPOConfig": GRPOConfig,
        "Sampling, updates, evaluation": DiffusionGRPOConfig,
        "How several rewards become one advantage": APEXConfig,
        "Model, prompts, rewards, adapter": TrainArguments,
    }.items():
        options = {}
        for f in [left.pop(f.name) for f in dataclasses.fields(cls) if f.name in left]:
            text = " ".join(f.metadata.get("help", "").split())
            if f.name not in REFUSED_FIELDS and text != argparse.SUPPRESS:  # no meaning here; an old name
                options[f.name] = default_of(f), text
        groups = {title: options} | groups
    return groups


def _names(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config) if f.init}


def _train(rest: list[str]) -> None:
    """Train, save the adapter, and write the report."""
    given, config = train_options(rest, ("model", "dataset", "rewards"))

    from .prompts import load_prompts
    from .trainers.apex import APEXTrainer
    from .trainers.callbacks import InterruptCallback
    from .trainers.logs import recorded_warnings

    column = given.prompt_column
    prompts = load_prompts(
        given.dataset, given.dataset_split, column, config=given.dataset_config, limit=given.max_prompts
    )
    if given.revision and given.model != "tiny":
        config.model_init_kwargs = {**(config.model_init_kwargs or {}), "revision": given.revision}
    rewards, monitors, interrupt = load_rewards(given.rewards), load_rewards(given.monitors), InterruptCallback()
    trainer = APEXTrainer(
        given.model,
        rewards,
        config,
        prompts,
        load_prompts(given.eval_dataset, given.eval_split, column) if given.eval_dataset else None,
        callbacks=[interrupt],
        peft_config=_lora_config(given),
        monitor_funcs=monitors,
        adapter=given.adapter,
    )
    interrupt.trainer = trainer
    main_process = trainer.is_world_process_zero()
    output_dir, command = Path(config.output_dir), "trl-apex train " + shlex.join(rest)
    trainer.sources, trainer.command = given, command
    with recorded_warnings(output_dir if main_process else None, trainer), interrupt.listening():
        try:
            trainer.train()
        except RuntimeError:
            if not interrupt.requested:
                raise
            command = re.sub(r" --resume[_-]from[_-]checkpoint[= ]\S+", "", command)
            raise KeyboardInterrupt(
                f"; a checkpoint is saved in {output_dir}. To go on: {command} --resume_from_checkpoint true"
            ) from None
    trainer.save_model(_internal_call=True)  # True: the upload comes last, with the report
    if main_process:
        report = output_dir / "report.html"
        print(f"Saved in {output_dir}. Report: {report if report.is_file() else 'none, see above'}")
    if config.push_to_hub:
        trainer.push_to_hub()


def _lora_config(given: TrainArguments) -> Any:
    if given.lora_r < 0:
        raise ValueError(
            f"`lora_r` must not be negative. Found {given.lora_r}. Use e.g. 32, or 0 to train all weights."
        )
    if given.adapter and given.lora_r == 0:
        raise ValueError("`lora_r` 0 trains all weights, and `adapter` trains an adapter. Found both. Leave one out.")
    names = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora")
    of_adapter = given.adapter and all(getattr(given, name) == getattr(TrainArguments, name) for name in names)
    if of_adapter or given.lora_r == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=given.lora_r,
        lora_alpha=given.lora_alpha or 2 * given.lora_r,
        target_modules=given.lora_target_modules,
        use_rslora=given.use_rslora,
        init_lora_weights="gaussian",
    )


# The other commands

PLAN_HELP = """Estimates memory by part and GPU, and the hours, of the configuration that `trl-apex train` would run.
Loads no weights. Takes the options of `trl-apex train`, and those below. --model may be sd3.5-medium, sd3.5-large,
flux.1-dev, sd1.5 or sdxl where the Hub cannot be reached."""


def _plan(
    rest: list[str], gpus: int, zero_stage: int, gpu_memory_gb: float | None, rewards_gb: float | None, **options: Any
) -> None:
    """Print the plan of a configuration; a plan that does not fit is an error."""
    given, config = train_options(rest, ["model"], on_gpu=True)

    from .plan import PlanSettings, check_fit, load_shapes, plan_text, reward_gb
    from .tiny.world import weights_path

    shapes = load_shapes(str(weights_path("pipeline") if given.model == "tiny" else given.model), given.revision)
    rewards_gb = reward_gb([*given.rewards, *given.monitors]) if rewards_gb is None else rewards_gb
    settings = PlanSettings(config, given.lora_r, given.lora_target_modules, gpus, zero_stage, rewards_gb)
    if gpu_memory_gb is not None:
        check_fit(shapes, settings, gpu_memory_gb)
    print(plan_text(shapes, settings, gpu_memory_gb, **options))


def _demo(quick: bool, **options: Any) -> None:
    from .demo import run_demo

    run_demo(**options | ({"max_steps": 12, "test_prompts": 48} if quick else {}))


def _evaluate(adapters: list[str], output_dir: str | None, **options: Any) -> None:
    """Compare adapters with their base, and write tables, pictures and report."""
    from .evaluation.run import markdown_table, run_evaluation
    from .report import write_report
    from .trainers.adapters import check_place
    from .trainers.publishing import FACTS_FILE, refresh_model_card

    for adapter in adapters:
        check_place(adapter)
    recorded, given = _recorded(Path(adapters[0])), {k: v for k, v in options.items() if v is not None}
    options = recorded | given
    if taken := {name: value for name, value in recorded.items() if name not in given}:
        print(f"From {adapters[0]}/config.json:", ", ".join(f"{name} {value}" for name, value in taken.items()))
    for name, flag in (("model", "model"), ("prompts", "dataset"), ("rewards", "rewards")):
        if not options.get(name):
            raise ValueError(
                f"`{flag}` must be given. Found none, nor one in {adapters[0]}/config.json. Pass --{flag}."
            )
    model, rewards, monitors = (options.pop(name, []) for name in ("model", "rewards", "monitors"))
    alone = len(adapters) == 1
    folder = Path(output_dir or (adapters[0] if alone and Path(adapters[0]).is_dir() else "evaluation"))
    if model == "tiny":
        options.setdefault("max_sequence_length", 12)
    options |= {"rewards": load_rewards(rewards), "monitors": load_rewards(monitors)}
    results = run_evaluation(model, adapters, output_dir=folder, **options)
    print(f"\n{markdown_table(results)}\nTables and pictures: {folder}")
    if alone:
        if (folder / FACTS_FILE).is_file():  # a training run: its card gets the results
            refresh_model_card(folder)
        print(f"Report: {write_report([folder])}")


def _recorded(run: Path) -> dict[str, Any]:
    """What the config.json of a run says of its model, its evaluation prompts, its rewards and its sampler."""
    from .trainers.logs import EVAL_PROMPTS
    from .trainers.publishing import read_json

    config = read_json(run / "config.json")
    if not config:
        return {}
    same = ("model", "rewards", "monitors", "negative_prompt", "max_sequence_length", "seed")
    found = {name: config.get(name) for name in same}
    for name in ("num_inference_steps", "guidance_scale", "height", "width"):
        own = config.get(f"eval_{name}")
        found[name] = config.get(name) if own is None else own
    if (run / EVAL_PROMPTS).is_file():
        found["prompts"] = str(run / EVAL_PROMPTS)
    else:
        held_out = config.get("eval_dataset") or (config.get("dataset") == "tiny" and "tiny")
        found["prompts"] = held_out or config.get("dataset")
        found["split"] = config.get("eval_split", "test") if held_out else config.get("dataset_split")
        found["prompt_column"] = config.get("prompt_column")
        if found["prompts"] and not held_out:
            logger.warning("The run names no `eval_dataset`: these are its training prompts, %s.", found["prompts"])
    for kind in ("rewards", "monitors"):
        if not isinstance(found[kind] or [], list):
            raise ValueError(
                f"`{kind}` in {run}/config.json must be a list of names. Found {found[kind]!r}. Pass --{kind}, or restore the file."
            )
        if None in (found[kind] or ()):
            logger.warning("config.json does not name all %s: some were made in the script.", kind)
            found[kind] = None
    return {name: value for name, value in found.items() if value not in (None, "", [])}


def _report(run_dirs: list[str], output: str | None, figures: bool) -> None:
    from .report import write_figures, write_report

    print(write_report(run_dirs, output))
    for run_dir in run_dirs if figures else ():
        print(*write_figures(run_dir), sep="\n")


def _push(run_dir: str, repo_id: str, **options: Any) -> None:
    """Upload a run directory, with report, figures and model card written anew."""
    from .report import write_figures, write_report
    from .trainers.publishing import check_uploadable, push_run, refresh_model_card

    check_uploadable(run_dir)  # says what is missing before anything is written
    try:
        write_report([run_dir])
        write_figures(run_dir)
    except (ImportError, FileNotFoundError) as error:
        print(f"Without pictures of the run: {error}")
    refresh_model_card(run_dir, repo_id)
    print(push_run(run_dir, repo_id, **options))


def _serve_rewards(reward: list[str], env: str | None, **options: Any) -> None:
    if env:
        from .serving.local import make_environment

        if not reward:
            raise ValueError(
                "`--env` must have a `--reward`. Found none. For deqa: 'published_deqa(trust_remote_code=True)'."
            )
        python = str(make_environment(env))
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        given += [f"--reward={name}" for name in reward]
        os.execv(python, [python, "-m", "trl_apex", "serve-rewards", *given])
    from .serving.server import serve

    serve(reward, **options)


def _rewards() -> None:
    """Print the built-in rewards; memory is that of the published weights in their default precision."""
    from . import rewards
    from .plan import reward_gb

    print(f"{'name':<24}{'range (larger is better)':<36}{'memory':<9}{'extra':<8}licence of the weights")
    for name, path in REWARDS.items():
        reward, size = getattr(rewards, path.partition(":")[2]), reward_gb([name])
        span, memory = reward.range.removesuffix(", larger is better"), f"{size:.1f} GB" if size else ""
        print(f"{name:<24}{span:<36}{memory:<9}{getattr(reward, 'extra', ''):<8}{reward.weights_licence}")


def _env() -> None:
    """Print versions, devices and the environment variables that change behaviour; of tokens only whether they are set."""
    import platform
    import shutil

    import torch

    from .trainers.logs import versions

    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        **versions(),
        "cpu": f"{os.cpu_count()} cores",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here",
        "torch built for": f"CUDA {torch.version.cuda or 'no'}, ROCm {torch.version.hip or 'no'}",
    }
    device = torch.accelerator.current_accelerator(check_available=True)
    describe = getattr(torch.get_device_module(device), "get_device_properties", None)  # Apple's has none
    for index in range(torch.accelerator.device_count() if device else 0):
        facts[f"{device} {index}"] = "present"
        if describe:
            facts[f"{device} {index}"] = f"{describe(index).name}, {describe(index).total_memory / 1e9:.0f} GB"
    facts |= {} if device else {"accelerators": "none"}
    shown = "CUDA_VISIBLE_DEVICES HF_ENDPOINT HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF"
    secret = "HF_TOKEN TRL_APEX_REWARD_TOKEN WANDB_API_KEY"
    facts |= {name: os.environ[name] for name in shown.split() if name in os.environ}
    facts |= {name: "set" for name in secret.split() if os.environ.get(name)}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
