"""Configurations full of nonsense: each is either taken, or refused with a message that names the field."""

import dataclasses
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_args, tiny_pipeline, tiny_trainer
from trl import GRPOConfig

from trl_apex import APEXConfig
from trl_apex.cli import train_options
from trl_apex.trainers.config import TYPED_FIELDS, DiffusionGRPOConfig

INHERITED = {field.name for field in dataclasses.fields(GRPOConfig)}
OURS = sorted(
    ({field.name for field in dataclasses.fields(APEXConfig)} - INHERITED)
    | (set(DiffusionGRPOConfig.__annotations__) - {"args", "report_to", "prompt_cache_dir", "compile_denoiser"})
    | TYPED_FIELDS
)
NONSENSE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**6, -(10**20), 10**20]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 5), st.floats(), st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.binary(max_size=3),
)
# Large but legal sizes would be trained on a machine that has the room.
TOO_LARGE = 2000
QUIET = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def attempt(field: str, value, folder, pipeline) -> str | None:
    """The message of the refusal; None where a trainer could be built."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny_args(folder, **{field: value})
            if not (isinstance(value, int) and value > TOO_LARGE):
                tiny_trainer(folder, pipeline=pipeline, lora=None, **{field: value})
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def check(field: str, value, folder, pipeline) -> bool:
    message = attempt(field, value, folder, pipeline)
    if message is not None:
        assert f"`{field}`" in message or field in message, f"{field}={value!r}: {message}"
        assert "Found" in message or field in message, message
    return message is not None


@settings(QUIET, max_examples=60)
@given(field=st.sampled_from(OURS), value=NONSENSE)
@example(field="noise_level", value="0.7")
@example(field="guidance_scale", value=float("nan"))
@example(field="num_inference_steps", value=2.5)
@example(field="num_generations", value="2")
@example(field="reward_timeout", value=-1.0)
@example(field="sde_window_range", value=[1])
def test_one_field(field, value, tmp_path, pipeline):
    check(field, value, tmp_path, pipeline)


@pytest.mark.slow
def test_many_fields(tmp_path, pipeline, figure):
    counts = {"tried": 0, "refused_by_name": 0}

    @settings(QUIET, max_examples=400)
    @given(field=st.sampled_from(OURS), value=NONSENSE)
    def each(field, value):
        counts["tried"] += 1
        counts["refused_by_name"] += check(field, value, tmp_path, pipeline)

    each()
    figure("configurations", counts)


LINES = st.lists(
    st.tuples(
        st.sampled_from([*OURS, "model", "dataset", "rewards", "lora_r", "nothing", "env", "max_steps", "1", "é"]),
        st.one_of(
            st.text(max_size=8), st.integers().map(str), st.floats().map(str), st.just("[1, x]"), st.just("{a: b}")
        ),
    ),
    max_size=4,
)


def read_yaml(path) -> str | None:
    """The message of the refusal; None where the file could be read."""
    try:
        train_options(["--config", str(path), "--output_dir", str(path.parent / "run"), "--use_cpu", "true"])
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip()
        return str(error)
    return None


@settings(QUIET, max_examples=60)
@given(lines=LINES)
@example(lines=[("noise_level", "much")])
@example(lines=[("learning_rate", "3e-4")])
@example(lines=[("max_steps", "[1, 2]")])
def test_yaml_of_random_entries(lines, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in lines), encoding="utf-8")
    read_yaml(path)


@settings(QUIET, max_examples=60)
@given(content=st.binary(max_size=60))
def test_yaml_of_random_bytes(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    read_yaml(path)


@pytest.mark.parametrize(
    "content, named",
    [
        ("noise_level: much\n", "noise_level"),
        ("num_generations: two\n", "num_generations"),
        ("guidance_scal: 2\n", "guidance_scal (did you mean guidance_scale?)"),
        ("sde_window_range: {a: b}\n", "sde_window_range"),
        ("- a\n- b\n", "options as `name: value`"),
        ("noise_level: [0.7\n", "must be valid YAML"),
    ],
)
def test_yaml_that_is_wrong_is_refused_by_name(content, named, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert named in (read_yaml(path) or "")


def test_yaml_that_names_code_does_not_run_it(tmp_path):
    path, sign = tmp_path / "config.yaml", tmp_path / "ran"
    path.write_text(f"seed: !!python/object/apply:os.system ['touch {sign}']\n")
    assert "must be valid YAML" in (read_yaml(path) or "")
    assert not sign.exists()
