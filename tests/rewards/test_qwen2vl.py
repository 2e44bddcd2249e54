"""What the Qwen2-VL judges share: frames and patches against other implementations of them, names, the instruction."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.judges import (
    FRAME_TEMPLATE,
    MEAN,
    STD,
    base_config,
    make_tokenizer,
    official_patches,
    smart_resize,
    write_base,
    write_instruction,
)
from torch import nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.qwen2vl import model as qwen2vl
from arcopo_fast.rewards.qwen2vl.frames import Patches, fitting_size, grayscale, quantize, resize, sample_frames
from arcopo_fast.rewards.qwen2vl.text import Conversation, load_tokenizer, read_instruction

pytestmark = pytest.mark.usefixtures("published")


# Frames ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fps", "expected"), [(81, 16, 10), (240, 16, 30), (21, 16, 4), (81, 24, 6), (3, 16, 2), (2, 16, 2), (9999, 8, 768)]
)
def test_frames_of_a_video(count: int, fps: float, expected: int) -> None:
    indices = sample_frames(count, fps)
    assert len(indices) == expected and indices[0] == 0 and indices[-1] == count - 1


def test_frames_are_spread_evenly() -> None:
    for _ in range(200):
        count, fps = random.randint(2, 400), random.uniform(4, 40)
        indices = sample_frames(count, fps)
        assert len(indices) % 2 == 0 and min(4, count // 2 * 2) <= len(indices) <= count
        if 5 <= count / fps * 2 <= count - 2:
            assert abs(len(indices) - count / fps * 2) <= 1
        exact = np.linspace(0, count - 1, len(indices))
        assert np.abs(indices.numpy() - exact).max() <= 0.5 + 1e-4


def test_a_single_frame_is_taken_twice() -> None:
    assert sample_frames(1, 16).tolist() == [0, 0]


def test_sizes() -> None:
    assert fitting_size(480, 832, least=128 * 784, most=200704) == (336, 588)
    assert fitting_size(480, 832, least=200704, most=200704) == (336, 588)
    assert fitting_size(336, 588, least=128 * 784, most=200704) == (336, 588)


def test_sizes_are_those_of_transformers() -> None:
    for _ in range(300):
        height, width = random.randint(28, 1200), random.randint(28, 1200)
        least = random.choice([128 * 784, 200704])
        size = fitting_size(height, width, least=least, most=200704)
        assert size == smart_resize(height, width, factor=28, min_pixels=least, max_pixels=200704)
        assert size[0] % 28 == size[1] % 28 == 0


@pytest.mark.parametrize("size", [(56, 84), (112, 140)], ids=["smaller", "larger"])
def test_resizing_is_that_of_pillow(size: tuple[int, int]) -> None:
    coarse = torch.rand(2, 3, 9, 13)
    frames = quantize(nn.functional.interpolate(coarse, (90, 130), mode="bilinear"))
    ours = resize(frames, size)
    for frame, resized in zip(frames, ours):
        image = Image.fromarray(frame.permute(1, 2, 0).byte().numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        difference = (resized.permute(1, 2, 0) - torch.from_numpy(np.asarray(image).copy()).float()).abs()
        assert difference.max() <= 1 and difference.mean() < 0.3  # Pillow rounds after each direction
    assert torch.equal(resize(frames, (90, 130)), frames), "the same size changes nothing"
    edges = resize(255 * torch.rand(1, 3, 90, 130).round(), size)
    assert edges.min() == 0 and edges.max() == 255, "bicubic overshoots"


def test_grey() -> None:
    frames = quantize(torch.rand(2, 3, 8, 9))
    gray = grayscale(frames)
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 1], gray[:, 2])
    exact = 0.2989 * frames[:, 0].double() + 0.587 * frames[:, 1].double() + 0.114 * frames[:, 2].double()
    assert ((gray[:, 0] <= exact + 1e-4) & (exact < gray[:, 0] + 1 + 1e-4)).all()


@pytest.mark.parametrize("count", [1, 2, 5], ids=["image", "pair", "odd"])
def test_patches_are_those_of_transformers(count: int) -> None:
    frames = torch.randint(0, 256, (count, 3, 84, 56), dtype=torch.uint8)
    patches = Patches(tuple(MEAN), tuple(STD))
    ours, grid = patches.cut(frames.float())
    expected, expected_grid = official_patches(frames)
    assert list(grid) == expected_grid and patches.features(grid) == len(expected) // 4
    torch.testing.assert_close(ours, expected)


def test_patches_of_a_video_are_those_of_transformers() -> None:
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    frames = torch.randint(0, 256, (6, 3, 84, 56), dtype=torch.uint8)
    expected = Qwen2VLVideoProcessor(image_mean=MEAN, image_std=STD, do_resize=False)([frames], return_tensors="pt")
    ours, grid = Patches(tuple(MEAN), tuple(STD)).cut(frames.float())
    assert list(grid) == expected["video_grid_thw"][0].tolist()
    torch.testing.assert_close(ours, expected["pixel_values_videos"])


# The network -----------------------------------------------------------------------------------------------------------------------


def test_the_published_checkpoint_has_as_many_tensors_as_the_network_wants(tmp_path: Path) -> None:
    """VideoReward's model.pth holds 1123 tensors, lm_head among them, as public loaders report."""
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28, "rope_scaling": None}
    config = base_config() | sizes | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    config["vision_config"] |= {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(config))
    judge = qwen2vl.build(tmp_path, make_tokenizer(), lambda width: nn.Linear(width, 1, bias=False))
    with pytest.raises(UserError) as raised:
        qwen2vl.load_strict(judge, {}, tmp_path, dtype=torch.float32, lora=qwen2vl.LoRA(64, 2.0))
    assert f"{1123 - 1} missing" in str(raised.value)
    assert all(parameter.is_meta for parameter in judge.parameters())
    assert not any(buffer.is_meta for buffer in judge.buffers()) and all(buffer.dtype == torch.float32 for buffer in judge.buffers())
    weights = sum(parameter.numel() for parameter in judge.parameters()) - judge.language_model.embed_tokens.weight.numel() + 151660 * 1536
    assert math.isclose(weights * 2, 4.42e9, rel_tol=0.01), "what VideoAlign's `bytes` says"


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("base_model.model.visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
        ("base_model.model.model.layers.1.self_attn.q_proj.base_layer.bias", "language_model.layers.1.self_attn.q_proj.bias"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight", "language_model.layers.1.mlp.up_proj.lora_B.weight"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", "language_model.layers.1.mlp.up_proj.lora_B.weight"),
        ("base_model.model.model.language_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("base_model.model.rm_head.weight", "rm_head.weight"),
        ("rm_head.3.bias", "rm_head.3.bias"),
    ],
)
def test_names(official: str, ours: str) -> None:
    assert qwen2vl.judge_name(official) == ours


def test_the_scale_of_an_adapter() -> None:
    assert qwen2vl.LoRA.from_config({"lora_r": 64, "lora_alpha": 128}) == qwen2vl.LoRA(64, 2.0)
    assert qwen2vl.LoRA.from_config({"lora_r": 64, "lora_alpha": 128, "use_rslora": True}) == qwen2vl.LoRA(64, 16.0)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive", json.dumps({"a": 1}).encode()])
@pytest.mark.parametrize("name", ["model.pth", "HPSv3.safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as weights"):
        qwen2vl.read_tensors(tmp_path / name)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Path("x")}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        qwen2vl.read_tensors(tmp_path / "model.pth")


def test_a_base_model_that_cannot_be_built(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(base_config() | {"num_attention_heads": 7}))
    with pytest.raises(UserError, match="no Qwen2-VL can be built"):
        qwen2vl.build(base, make_tokenizer(), lambda width: nn.Linear(width, 1))
    (base / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="preprocessor_config.json has no image_mean"):
        qwen2vl.load_patches(base)


# The instruction -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["weights/file.py", "models/owner/name/sub/file.py", "models/name/sub/file.py"])
def test_the_instruction_is_read_and_never_run(tmp_path: Path, place: str) -> None:
    write_instruction(tmp_path / place, FIRST=FRAME_TEMPLATE[0], second=FRAME_TEMPLATE[1])
    arguments = (tmp_path / "weights", "github://owner/name/sub/file.py")
    assert read_instruction(*arguments, ["FIRST", "second"]) == "".join(FRAME_TEMPLATE)
    for missing in ("THIRD", "NUMBER"):
        with pytest.raises(UserError, match=f"file.py has no text {missing}, only FIRST, second"):
            read_instruction(*arguments, ["FIRST", missing])


def test_a_missing_instruction_says_where_to_get_it_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_instruction(tmp_path, "github://owner/name/sub/file.py", ["FIRST"])
    assert "get https://raw.githubusercontent.com/owner/name/" in str(raised.value) and "$ARCOPO_MODELS/owner/name" in str(raised.value)
    (tmp_path / "file.py").write_text("FIRST = (")
    with pytest.raises(UserError, match="is not a Python file"):
        read_instruction(tmp_path, "github://owner/name/sub/file.py", ["FIRST"])


def test_a_conversation(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_base(tmp_path / "base"), ["<|Reward|>"])
    assert tokenizer.token_to_id("<|Reward|>") == make_tokenizer().get_vocab_size()
    conversation = Conversation(tokenizer, "".join(FRAME_TEMPLATE), "<|image_pad|>", ["<|Reward|>"])
    ids, places = conversation.encode("a {brace} and ünïcode", 3)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>\nJudge" in text
    assert "Text - a {brace} and ünïcode\n" in text
    assert text.startswith("<|im_start|>system\n") and text.endswith("END\n<|im_end|>\n<|im_start|>assistant\n")
    assert [ids[place] for place in places] == [tokenizer.token_to_id("<|Reward|>")]
    for reserved in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(UserError, match="reserves for itself"):
            conversation.encode(f"a cat {reserved}", 3)


def test_a_template_without_its_parts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_base(tmp_path / "base"), ["<|Reward|>"])
    with pytest.raises(UserError, match=r"no \{text_prompt\} and no <\|Reward\|>"):
        Conversation(tokenizer, "Judge this.", "<|image_pad|>", ["<|Reward|>"])
