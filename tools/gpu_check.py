"""Checks the trainers on one GPU and measures them at real size, in at most eight minutes and without a network.

    python tools/gpu_check.py                      # writes benchmarks/results/gpu_check.json and .md
    python tools/gpu_check.py --parts sd35 full    # some parts only
    python tools/gpu_check.py --smoke              # the same on a CPU at toy size, to see that the script works

Parts:
    tests   `pytest -m gpu`: both diffusion trainers, every rule, LoRA and full, in float32, bf16 and fp16
    demo    the demo, shortened, on the CPU and on the GPU: the same rewards within the noise of arithmetic
    sd35    Stable Diffusion 3.5 medium's shapes with random weights: seconds and peak memory of rollout, decode and update,
            each against `trl-apex plan`; the ratio of the first update in bf16; the probe's cost; the plain loop
    full    one full fine-tuning update of the largest model that fits

Every part runs in a process of its own with a time limit and adds a line to a file after each measurement. A part that
fails or takes too long is recorded with its error, and the rest goes on.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]

# The paths come first.
import diffusers
import torch
import transformers
from _bench import table, write
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from peft import LoraConfig
from plain_loop import PlainLoop, Work

from trl_apex import APEXConfig, APEXTrainer, MultiObjectiveRewardAggregator
from trl_apex.demo import run_demo
from trl_apex.plan import PlanSettings, load_shapes, memory
from trl_apex.tiny.pipeline import build_pipeline

Record = dict[str, Any]
LIMITS = {"tests": 125, "demo": 70, "sd35": 200, "full": 75}  # seconds; 470 in all

MEDIUM: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
LARGE = {
    **MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The shapes of parts `sd35` and `full`."""

    transformer: dict[str, Any] = field(default_factory=lambda: MEDIUM)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    side: int = 512  # pixels
    text: int = 333  # tokens of a prompt
    images: int = 8  # of an iteration, one prompt
    batch: int = 4  # images in a forward of the update
    steps: int = 10  # denoising steps, of which two are trained
    rank: int = 32  # of LoRA
    full: tuple[dict[str, Any], ...] = (  # to fine-tune fully, the largest first
        LARGE,
        MEDIUM,
        {**MEDIUM, "num_layers": 16},
        {**MEDIUM, "num_layers": 8, "dual_attention_layers": tuple(range(8))},
    )


_SMALL = {
    **MEDIUM, "sample_size": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
}  # fmt: skip
SMOKE = Size(
    transformer=_SMALL,
    vae={**VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32},
    side=32,
    text=8,
    images=4,
    batch=2,
    steps=4,
    rank=2,
    full=(_SMALL,),
)


class Meter:
    """Seconds and, on a GPU, peak memory of named phases; a phase inside another counts for both."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, int] = defaultdict(int)
        self.open: dict[str, float] = {}

    def begin(self, phase: str) -> None:
        self._read_peak()
        self.open[phase] = time.perf_counter()

    def end(self, phase: str) -> None:
        if phase in self.open:
            self._read_peak()
            self.seconds[phase] += time.perf_counter() - self.open.pop(phase)

    def around(self, owner: Any, method: str, phase: str) -> None:
        """Measure every call of a method of one object."""
        call = getattr(owner, method)

        def measured(*arguments: Any, **keywords: Any) -> Any:
            self.begin(phase)
            try:
                return call(*arguments, **keywords)
            finally:
                self.end(phase)

        setattr(owner, method, measured)

    def found(self) -> Record:
        """`{phase}_s` and `{phase}_gb` (1e9 bytes) of every phase."""
        found: Record = {f"{name}_s": round(value, 4) for name, value in self.seconds.items()}
        if self.cuda:
            found |= {f"{name}_gb": round(value / 1e9, 3) for name, value in self.peaks.items()}
        return found

    def _read_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            for name in self.open:
                self.peaks[name] = max(self.peaks[name], peak)
            torch.cuda.reset_peak_memory_stats(self.device)


# Random models of real shapes


def random_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    return _made_on(device, dtype, diffusers.SD3Transformer2DModel, config)


def _made_on(device: torch.device, dtype: torch.dtype, kind: Callable, config: dict[str, Any]) -> Any:
    """A frozen module whose weights are drawn on the device in `dtype`: nothing is copied and nothing is twice as large."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return kind(**config).to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_pipeline(size: Size, transformer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A Stable Diffusion 3 pipeline whose prompts become random embeddings of the right shape."""
    tiny = build_pipeline(0)  # its text encoders fill the places; they are never asked
    vae = _made_on(device, dtype, diffusers.AutoencoderKL, size.vae)
    parts = {name: part for name, part in tiny.components.items() if name.startswith(("text_", "tokenizer"))}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **parts)
    config = transformer.config

    def encode_prompt(prompt: str | list[str], *others: Any, **options: Any) -> tuple[Any, None, Any, None]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        generators = [torch.Generator().manual_seed(sum(text.encode())) for text in texts]
        embeds = [torch.randn(size.text, config.joint_attention_dim, generator=generator) for generator in generators]
        pooled = [torch.randn(config.pooled_projection_dim, generator=generator) for generator in generators]
        return torch.stack(embeds).to(device, dtype), None, torch.stack(pooled).to(device, dtype), None

    pipeline.encode_prompt = encode_prompt
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def brightness(prompts: list[str], images: torch.Tensor, **columns: Any) -> list[float]:
    return images.float().mean((1, 2, 3)).tolist()


def redness(prompts: list[str], images: torch.Tensor, **columns: Any) -> list[float]:
    return (images[:, 0] - images[:, 1]).float().mean((1, 2)).tolist()


# Part sd35


def train_and_measure(pipeline: Any, size: Size, device: torch.device, peft: bool = True, **options: Any) -> Record:
    """Two iterations of an `APEXTrainer`; the second is measured, since the first warms up.

    Seconds and peaks by phase (`rollout` holds `decode`), the largest |ratio - 1| of the first update, and the memory that the
    plan foresees for the same configuration.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": device.type == "cpu",
            "bf16": device.type != "cpu",
            "max_steps": 2,
            "updates_per_iteration": 1,
            "num_generations": size.images,
            "generation_batch_size": size.images,
            "per_device_train_batch_size": size.batch,
            "rollout_batch_size": size.images,
            "num_inference_steps": size.steps,
            "sde_window_size": 2,
            "guidance_scale": 4.5,
            "height": size.side,
            "width": size.side,
            "max_sequence_length": size.text,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        config = APEXConfig(**{**settings, **options})
        trainer = APEXTrainer(
            pipeline,
            [brightness, redness],
            config,
            Dataset.from_dict({"prompt": ["a lighthouse in a storm", "a bowl of oranges"]}),
            peft_config=LoraConfig(r=size.rank, lora_alpha=2 * size.rank) if peft else None,
        )
        meter = Meter(device)

        class Updates(transformers.TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
                meter.begin("update")

            def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
                meter.end("update")
                if state.global_step == 1:
                    meter.clear()

        rollout = trainer._generate_and_score_completions

        def measured_rollout(inputs: Any) -> Any:
            meter.open.pop("update", None)  # what comes after it is the update
            meter.begin("rollout")
            made = rollout(inputs)
            meter.end("rollout")
            meter.begin("update")
            return made

        trainer._generate_and_score_completions = measured_rollout  # type: ignore[method-assign]
        meter.around(trainer.policy, "decode", "decode")
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Updates())
        try:
            trainer.train()
            found = meter.found()
            first = trainer.state.log_history[0]
            found["ratio_deviation_of_first_update"] = first.get("ratio/max_deviation")
            if pipeline.transformer.config.num_layers == size.transformer["num_layers"]:  # the plan is for this model
                found |= guarded(lambda: against_plan(config, found, size.rank if peft else 0))
            return found
        finally:
            if peft:
                trainer.model.unload().requires_grad_(False)  # type: ignore[operator]
            pipeline.transformer.disable_gradient_checkpointing()
            del trainer
            _free()


medium_shapes = cache(partial(load_shapes, "sd3.5-medium"))


def against_plan(config: Any, found: Record, rank: int) -> Record:
    """The memory that the plan foresees, and measured over planned."""
    planned = memory(medium_shapes(), PlanSettings(config, rank))
    planned.always.pop("text encoders", None)  # the tiny encoders are none worth the name
    result: Record = {}
    for phase in ("rollout", "update"):
        value = planned.total(phase)
        result[f"planned_{phase}_gb"] = round(value, 2)
        if found.get(f"{phase}_gb"):
            result[f"{phase}_over_plan"] = round(found[f"{phase}_gb"] / value, 3)
    return result


def guarded(measure: Callable[[], Record]) -> Record:
    """What `measure` finds, or the error that it ends with."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    finally:
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SETTINGS: dict[str, dict[str, Any]] = {
    "as it is: checkpointing, guidance 4.5": {},
    "guidance 1": {"guidance_scale": 1.0},
    "without checkpointing": {"gradient_checkpointing": False},
    "two timesteps a forward": {"timestep_batch_size": 2},
    "gradient probe in every update": {"gradient_probe": True, "probe_every": 1},
    "images decoded and sampled two at a time": {"rollout_batch_size": 2},
    "compiled blocks": {"compile_denoiser": True},
}


def part_sd35(size: Size, device: torch.device, record: Callable[[Record], None]) -> None:
    """LoRA at real size: every setting, then the plain loop."""
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    started = time.perf_counter()
    transformer = random_transformer(size.transformer, device, dtype)
    pipeline = random_pipeline(size, transformer, device, dtype)
    parameters = sum(p.numel() for p in transformer.parameters())
    record({"what": "model made on the device", "parameters_M": parameters / 1e6, "s": time.perf_counter() - started})
    record({"what": "plain loop", **guarded(lambda: plain_loop(pipeline, size, device))})
    for name, options in SETTINGS.items():
        record({"what": name, **guarded(partial(train_and_measure, pipeline, size, device, **options))})


def plain_loop(pipeline: Any, size: Size, device: torch.device) -> Record:
    """The second iteration of `examples/plain_loop.py` at the same size, with checkpointing."""
    work = Work(groups=1, group=size.images, batch=size.batch, side=size.side, steps=size.steps, rank=size.rank)
    aggregate = MultiObjectiveRewardAggregator(["brightness", "redness"])

    def of_picture(channel: int) -> Callable:
        def score(prompts: list[str], completions: list[Any]) -> list[float]:
            return [picture.resize((1, 1)).getpixel((0, 0))[channel] / 255 for picture in completions]

        return score

    pipeline.transformer.enable_gradient_checkpointing()
    loop = PlainLoop(pipeline, [of_picture(0), of_picture(1)], ["a lighthouse", "a bowl"], work, aggregate)
    loop.window = range(2)
    try:
        loop.iteration(0)
        meter = Meter(device)
        for method, phase in (("sample", "rollout"), ("decode", "decode"), ("update", "update")):
            meter.around(loop, method, phase)
        loop.iteration(1)
        return meter.found()
    finally:
        loop.model.unload().requires_grad_(False)
        pipeline.transformer.disable_gradient_checkpointing()


# Part full


def part_full(size: Size, device: torch.device, record: Callable[[Record], None]) -> None:
    """A full fine-tuning iteration of the largest model that fits: float32 weights, gradients and Adam, bf16 autocast."""
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else float("inf")
    for config in size.full:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in random_transformer(config, torch.device("meta"), dtype).parameters())
        least = 16 * parameters / 1e9
        line: Record = {"what": f"{parameters / 1e9:.2f} B parameters", "state_gb": round(least, 1)}
        if least > free:
            line["skipped"] = f"weights, gradients and Adam alone need more than the {free:.0f} GB that are free"
            record(line)
            continue

        def once(config: dict[str, Any] = config) -> Record:
            transformer = random_transformer(config, device, torch.float32)
            pipeline = random_pipeline(size, transformer, device, dtype)
            return train_and_measure(pipeline, size, device, peft=False, learning_rate=1e-6)

        found = guarded(once)
        record({**line, **found})
        if "error" not in found:
            return


# Part demo


def part_demo(size: Size, device: torch.device, record: Callable[[Record], None]) -> None:
    """The demo with few updates on the CPU and on the device, from the same seed."""
    few = size is SMOKE
    means: dict[str, Record] = {}
    for name in dict.fromkeys(["cpu", device.type]):

        def run(name: str = name) -> Record:
            _forget_device()
            with tempfile.TemporaryDirectory() as folder:
                options: dict[str, Any] = {
                    "max_steps": 2 if few else 8,
                    "use_cpu": name == "cpu",
                    "save_strategy": "no",
                }
                if few:
                    options |= {"per_device_train_batch_size": 8, "generation_batch_size": 8}
                summary = run_demo(folder, test_prompts=4 if few else 32, **options)
            means[name] = summary["objectives"]
            rows = {
                f"{key}_{when}": round(row[when], 4) for key, row in means[name].items() for when in ("base", "tuned")
            }
            return {"train_s": round(summary["seconds"]["train"], 2), **rows}

        record({"what": f"demo on {name}", **guarded(run)})
    if len(means) == 2:
        pairs = [(means["cpu"][key], means[device.type][key]) for key in means["cpu"]]
        # In standard errors of the base's mean: well below 1 where only rounding differs.
        for when in ("base", "tuned"):
            worst = max(abs(one[when] - other[when]) / max(abs(one[when]), 1e-9) for one, other in pairs)
            record({"what": f"largest relative difference of a mean reward, {when}", "value": round(worst, 5)})


def _forget_device() -> None:
    """Let accelerate choose its device anew in this process."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


# Part tests


def part_tests(size: Size, device: torch.device, record: Callable[[Record], None]) -> None:
    """`pytest -m gpu`, with the names of what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Without conftest and with warnings as warnings: the machine may have other versions, and no test libraries.
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-o", "filterwarnings=default"]
        command += ["-m", "gpu", "tests/gpu", f"--junitxml={report}"]
        environment = {**os.environ, "TRL_APEX_TEST_DEVICE": device.type}
        if size is SMOKE:
            command += ["-k", "apex and float32 and lora"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            record({"what": "pytest -m gpu", "error": (done.stdout + done.stderr)[-600:]})
            return
        suite = ElementTree.parse(report).getroot()[0]
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        record({"what": "pytest -m gpu", **counts, "s": round(float(suite.get("time", 0)), 1)})
        for case in suite.iter("testcase"):
            for problem in (*case.iter("failure"), *case.iter("error")):
                record({"what": case.get("name"), "error": (problem.get("message") or "")[:400]})


PARTS: dict[str, Callable[[Size, torch.device, Callable[[Record], None]], None]] = {
    "tests": part_tests,
    "demo": part_demo,
    "sd35": part_sd35,
    "full": part_full,
}


# The whole


def run_part(name: str, command: list[str], lines: Path, limit: float) -> list[Record]:
    """Run a part in a process that writes its records into `lines`; those records, and how the process ended."""
    started = time.perf_counter()
    end: Record = {"what": "the part"}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        if done.returncode:
            end["error"] = f"exit code {done.returncode}: {(done.stderr or done.stdout)[-600:]}"
    except subprocess.TimeoutExpired:
        end["error"] = f"took longer than its {limit:.0f} s and was ended"
    end["s"] = round(time.perf_counter() - started, 1)
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return [{"part": name, **record} for record in [*found, end]]


def markdown(machine: Record, records: list[Record]) -> str:
    """One table a part; a failed row says its error."""
    text = f"{machine['device']}, torch {machine['torch']}, {machine['seconds']:.0f} s in all\n"
    for part in dict.fromkeys(record["part"] for record in records):
        rows = [record for record in records if record["part"] == part]
        columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("part", "what", "error")))
        columns += ["error"] if any("error" in row for row in rows) else []
        lines = [[row["what"], *(_cell(row.get(name)) for name in columns)] for row in rows]
        text += f"\n### {part}\n\n{table(['', *columns], lines, '---:')}\n"
    return text


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).replace("|", "/").split())


def describe_machine(device: torch.device, seconds: float) -> Record:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, toy size"
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    size = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None
    return {"device": name, "memory_gb": size, "python": sys.version.split()[0], **versions, "seconds": seconds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="toy size on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    size, device = (SMOKE, torch.device("cpu")) if given.smoke else (Size(), torch.device("cuda", 0))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device. Found none. Use --smoke to see that the script works.", file=sys.stderr)
        return 2
    if given.child:
        with given.lines.open("a", buffering=1) as file:
            PARTS[given.child](size, device, lambda record: print(json.dumps(record), file=file))
        return 0
    started, records = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            lines = Path(folder) / f"{part}.jsonl"
            command = [sys.executable, str(Path(__file__).resolve()), "--child", part, "--lines", str(lines)]
            command += ["--smoke"] * given.smoke
            records += run_part(part, command, lines, LIMITS[part] * (4 if given.smoke else 1))
            print(json.dumps(records[-1]), flush=True)
    machine = describe_machine(device, round(time.perf_counter() - started, 1))
    given.out.mkdir(parents=True, exist_ok=True)
    write_results(given.out / "gpu_check.json", machine, records)
    return 1 if any("error" in record for record in records) else 0


def write_results(path: Path, machine: Record, records: list[Record]) -> None:
    """Write the JSON file, one record a line, and the Markdown tables beside it."""
    made = markdown(machine, records)
    write(path, {"machine": machine, "records": records}, made)
    print(made)


if __name__ == "__main__":
    sys.exit(main())
