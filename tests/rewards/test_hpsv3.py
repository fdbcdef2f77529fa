"""HPSv3 on a tiny Qwen2-VL: its Gaussian worked out one image at a time, and the authors' files."""

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import COLOURS, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from trl_apex.rewards import HPSv3Reward, RewardLoadError, image_reward

PROMPTS = ["a red circle", "a blue square with green"]
INSTRUCTION = "with {text_prompt} a <|Reward|> circle"
CHAT = (
    "{% for m in messages %}<|im_start|> {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configuration, tokenizer and image processor of a Qwen2-VL of two layers, and HPSv3's weights, as the authors name them."""
    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer = save_tokenizer(folder, COLOURS, length=512, wrap=False)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56).save_pretrained(folder)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    ids |= {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {
        "num_key_value_heads": 1,
        "vocab_size": 999,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    config.save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {authors_name(key): value for key, value in model.state_dict().items()}
    for layer, outputs, inputs in ((0, 1024, 32), (3, 16, 1024), (5, 2, 16)):
        state[f"rm_head.{layer}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"rm_head.{layer}.bias"] = torch.randn(outputs)
    save_file(state, folder / "HPSv3.safetensors")
    return folder


def authors_name(key):
    return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def gaussian_by_hand(folder, picture, prompt):
    """mu and log sigma of one image: no padding, positions 0, 1, 2 ..., and the head written out."""
    state, tokenizer = load_file(folder / "HPSv3.safetensors"), AutoTokenizer.from_pretrained(folder)
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.load_state_dict({key: state[authors_name(key)] for key in model.state_dict()})
    seen = Qwen2VLImageProcessorPil(min_pixels=200704, max_pixels=200704)(picture, return_tensors="pt")
    patches = "<|image_pad|>" * int(seen["image_grid_thw"].prod() // 4)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    text = f"<|im_start|> <|vision_start|>{patches}<|vision_end|>with {prompt} a <|Reward|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        h = model.model(input_ids=ids, position_ids=positions, **seen).last_hidden_state[0, -1].double()
    for layer in (0, 3, 5):
        h = state[f"rm_head.{layer}.weight"].double() @ h.relu() if layer else state["rm_head.0.weight"].double() @ h
        h = h + state[f"rm_head.{layer}.bias"]
    return h.tolist()


def pictures(*sizes):
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_the_mean_of_the_gaussian(folder):
    reward = HPSv3Reward(str(folder / "HPSv3.safetensors"), str(folder), INSTRUCTION, device="cpu")
    images = pictures((64, 64), (40, 90))
    expected = [gaussian_by_hand(folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert abs(expected[0][0] - expected[1][0]) > 0.01 and abs(expected[0][0] - expected[0][1]) > 0.01
    assert reward(prompts=PROMPTS, completions=images) == pytest.approx([mu for mu, _ in expected], abs=1e-4)
    with torch.inference_mode():
        gaussians = reward._gaussians(reward.load(), images, PROMPTS)
    assert gaussians.tolist() == [pytest.approx(gaussian, abs=1e-4) for gaussian in expected]


def test_only_complete_safetensors_are_loaded(folder, tmp_path):
    with pytest.raises(RewardLoadError, match="must be a safetensors file. Found HPSv3.pth"):
        HPSv3Reward("HPSv3.pth", str(folder), INSTRUCTION, device="cpu").load()
    state = load_file(folder / "HPSv3.safetensors")
    for lost in ("model.layers.1.mlp.up_proj.weight", "rm_head.5.bias"):
        save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "partial.safetensors")
        with pytest.raises(RewardLoadError, match="1 missing"):
            HPSv3Reward(str(tmp_path / "partial.safetensors"), str(folder), INSTRUCTION, device="cpu").load()


def test_the_instruction_is_read_from_the_authors_package_and_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="pip install --no-deps hpsv3"):
        image_reward.published_instruction()
    (tmp_path / "hpsv3" / "dataset").mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise RuntimeError('run')")
    source = 'import of_theirs\nINSTRUCTION = """Rate {text_prompt}."""\nprompt_with_special_token = "\\n<|Reward|>"\n'
    (tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py").write_text(source + "raise RuntimeError('run')")
    assert image_reward.published_instruction() == "Rate {text_prompt}.\n<|Reward|>"
