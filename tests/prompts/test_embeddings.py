"""Prompts are encoded once, kept in memory or on disk, and read back bit by bit."""

import threading
from pathlib import Path

import pytest
import torch
from families import build
from safetensors import safe_open

from trl_apex.diffusion.families import load_policy
from trl_apex.prompts import PromptEmbeddings
from trl_apex.prompts import embeddings as module
from trl_apex.prompts.embeddings import encoder_fingerprint


class Encoder:
    """Two tensors a prompt, one of them bfloat16, and a count of what was asked for."""

    def __init__(self):
        self.calls: list[list[str]] = []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        values = torch.tensor([[float(len(p)), float(ord(p[0]))] for p in prompts])
        return {"hidden": values.repeat(1, 3).reshape(len(prompts), 3, 2), "pooled": values.bfloat16()}

    @property
    def prompts(self):
        return [prompt for call in self.calls for prompt in call]


@pytest.fixture
def encoder():
    return Encoder()


def test_each_distinct_prompt_is_encoded_once_in_memory_and_on_disk(encoder, tmp_path):
    prompts = ["red", "blue", "red", "green", "ö"]
    memory = PromptEmbeddings(encoder, batch_size=2)
    expected = memory(prompts, "cpu")
    assert encoder.calls == [["red", "blue"], ["green", "ö"]]
    memory(prompts, "cpu")
    assert len(encoder.calls) == 2
    disk = PromptEmbeddings(encoder, batch_size=2, cache_dir=tmp_path, fingerprint="one")
    first = disk(prompts, "cpu")
    assert len(encoder.calls) == 4
    again = PromptEmbeddings(encoder, cache_dir=tmp_path, fingerprint="one")
    for found in (first, disk(prompts, "cpu"), again(prompts, "cpu")):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
    assert len(encoder.calls) == 4
    PromptEmbeddings(encoder, cache_dir=tmp_path, fingerprint="two")(["red"], "cpu")
    assert encoder.calls[4:] == [["red"]]


def test_rows_stay_on_disk(encoder, tmp_path):
    cache = PromptEmbeddings(encoder, batch_size=64, cache_dir=tmp_path)
    cache.precompute([f"prompt {i}" for i in range(64)])
    assert not cache._rows
    (shard,) = (tmp_path / "embeddings").glob("*.safetensors")
    with safe_open(shard, framework="pt") as file:
        assert file.get_slice("hidden").get_shape() == [64, 3, 2]
    assert cache(["prompt 63"], "cpu")["hidden"].shape == (1, 3, 2)
    maps = Path("/proc/self/maps")  # of Linux
    assert not maps.exists() or str(shard) in maps.read_text(), "the file is mapped into memory, not read into it"


def test_several_writers_at_once(tmp_path):
    prompts = [f"{i} prompts" for i in range(60)]
    encoders = [Encoder() for _ in range(4)]
    failures = []

    def work(encoder, order):
        try:
            found = PromptEmbeddings(encoder, batch_size=3, cache_dir=tmp_path)(order, "cpu")
            assert found["hidden"][:, 0, 0].tolist() == [float(len(p)) for p in order]
        except BaseException as error:
            failures.append(error)

    orders = [prompts, prompts[::-1], prompts, prompts[30:] + prompts[:30]]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(encoders, orders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list((tmp_path / "embeddings").glob(".*"))
    fresh = Encoder()
    PromptEmbeddings(fresh, cache_dir=tmp_path)(prompts, "cpu")
    assert fresh.calls == []


@pytest.mark.parametrize("damage", [b"", b"not a shard", "truncated", "other rows"])
def test_a_damaged_file_is_computed_again_with_a_warning(encoder, tmp_path, damage):
    PromptEmbeddings(encoder, batch_size=2, cache_dir=tmp_path).precompute(["a", "b", "c"])
    shard = next(p for p in (tmp_path / "embeddings").iterdir() if b'[\\"a' in p.read_bytes())
    content = shard.read_bytes()
    if damage == "truncated":
        damage = content[:-4]
    elif damage == "other rows":
        damage = content.replace(b'[\\"a\\", \\"b\\"]', b'[\\"a\\"]'.ljust(14))
    shard.write_bytes(damage)
    cache = PromptEmbeddings(encoder, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="cannot be read and its embeddings are computed again"):
        found = cache(["a", "b", "c"], "cpu")
    assert found["hidden"][:, 0, 1].tolist() == [97.0, 98.0, 99.0]
    assert encoder.calls == [["a", "b"], ["c"], ["a", "b"]]
    PromptEmbeddings(encoder, cache_dir=tmp_path)(["a", "b", "c"], "cpu")  # no warning any more
    assert len(encoder.calls) == 3


def test_after_closing_an_unknown_prompt_is_an_error(encoder, tmp_path):
    for cache in (PromptEmbeddings(encoder), PromptEmbeddings(encoder, cache_dir=tmp_path)):
        cache.precompute(["a"])
        cache.close("The encoders are gone.")
        assert cache(["a"], "cpu")["hidden"].shape == (1, 3, 2)
        with pytest.raises(ValueError, match="The encoders are gone. Found another prompt: 'b'"):
            cache(["a", "b"], "cpu")


def test_a_large_set_in_memory_is_warned_of(encoder, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 100.0)
    with pytest.warns(UserWarning, match="embeddings of 10 prompts .* Set `prompt_cache_dir`"):
        PromptEmbeddings(encoder).precompute([f"{i}" for i in range(10)])


def test_what_is_too_large_for_memory_goes_to_disk(encoder, tmp_path):
    prompts = [f"{i}" for i in range(10)]
    small = PromptEmbeddings(encoder, batch_size=4, overflow_dir=tmp_path, budget=1000.0)
    small.precompute(prompts)  # 10 x (3 x 2 x 4 + 2 x 2) bytes
    assert not small.on_disk and not list(tmp_path.iterdir())
    large = PromptEmbeddings(encoder, batch_size=4, overflow_dir=tmp_path, budget=200.0)
    large.precompute(prompts[:4], total=10)
    assert large.on_disk and not large._rows
    found, expected = large(prompts, "cpu"), small(prompts, "cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(encoder.prompts) == 20


def test_the_fingerprint_tells_encoders_apart():
    def of(pipeline, length=12):
        return encoder_fingerprint(pipeline, load_policy(pipeline).encoder_names, length)

    pipeline = build("sd3")
    first = of(pipeline)
    assert first.startswith("StableDiffusion3Pipeline-") and of(build("sd3")) == first
    assert of(pipeline, 13) != first and of(build("sd3", seed=1)) != first
    with torch.no_grad():
        next(pipeline.text_encoder_2.parameters()).view(-1)[0] += 1
    assert of(pipeline) != first
    changed = build("sd3")
    changed.tokenizer.model_max_length -= 1
    assert of(changed) != first
    changed = build("sd3")
    changed.text_encoder_3.to(torch.bfloat16)
    assert of(changed) != first
    transformer = build("sd3")
    transformer.transformer.to(torch.bfloat16)
    assert of(transformer) == first
