"""CLIP-score on a tiny random model in the published layout, against transformers' own way of doing it, image by image."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.clip import SOURCE, CLIPScore, sampled_frames

try:  # without torchvision it is the one that goes through PIL
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

ROUNDING = 1e-6
PROMPTS = ["a red fox in the snow", "two boats at sea", "rain"]
LEVELS = 1.5
"""Difference to the reference in levels of 256: it rounds to whole ones after each direction of the resizing."""


def write_tokenizer(directory: Path) -> int:
    """One token for every letter, alone or at the end of a word; returns the size of the vocabulary."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast.from_pretrained(directory, model_max_length=77).save_pretrained(directory)
    return len(vocabulary)


def write_checkpoint(directory: Path, *, image_size: int = 28) -> Path:
    directory.mkdir(parents=True)
    vocabulary = write_tokenizer(directory)
    common: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = common | {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    config = CLIPConfig(text_config=text, vision_config=common | {"image_size": image_size, "patch_size": 7}, projection_dim=24)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "openai" / "clip-vit-large-patch14")


@pytest.fixture(scope="module")
def reward(checkpoint: Path) -> CLIPScore:
    return CLIPScore(checkpoint)


def videos(count: int = 3, frames: int = 30, height: int = 40, width: int = 66) -> Tensor:
    """Smooth colours that move, and some noise."""
    smooth = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 5, 6), size=(frames, height, width), mode="trilinear").transpose(1, 2)
    return (0.8 * smooth + 0.2 * torch.rand(count, frames, 3, height, width)).contiguous()


def processor(size: int) -> Any:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def reference(checkpoint: Path, video: Tensor, prompt: str) -> float:
    """By transformers' own preprocessing and logits, frame by frame."""
    model = CLIPModel.from_pretrained(checkpoint).eval()
    text = CLIPTokenizerFast.from_pretrained(checkpoint)([prompt], truncation=True, max_length=77, return_tensors="pt")
    cosines = []
    for frame in video:
        image = (frame * 255).round().byte().permute(1, 2, 0).numpy()
        pixels = processor(model.config.vision_config.image_size)(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            cosines.append(model(**text, pixel_values=pixels).logits_per_image.item() / model.logit_scale.exp().item())
    return float(np.mean(cosines))


def test_it_is_the_mean_cosine_that_transformers_computes(reward: CLIPScore, checkpoint: Path) -> None:
    frames = (videos(3, 25) * 255).round() / 255
    scores = score({"clip": reward}, frames, PROMPTS)["clip"]
    for index, prompt in enumerate(PROMPTS):
        assert abs(scores[index] - reference(checkpoint, frames[index][[0, 12, 24]], prompt)) < 5e-3
    assert (scores.abs() < 1).all() and scores.max() - scores.min() > 1e-3


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (224, 224), (301, 233), (100, 180)])
def test_pixels_are_those_of_the_official_preprocessing(height: int, width: int, tmp_path: Path) -> None:
    reward = CLIPScore(write_checkpoint(tmp_path / "clip", image_size=224))
    hard = torch.rand(1, 1, 3, height, width) < torch.rand(3, 1, 1)  # overshoots
    levels = (torch.where(torch.rand(height, width) < 0.5, videos(1, 1, height, width), hard.float())[0] * 255).round()
    ours = reward.pixels(levels / 255)
    theirs = processor(224)(levels[0].byte().permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    in_levels = (ours - theirs) * 255 * torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    assert ours.shape == (1, 3, 224, 224)
    assert in_levels.abs().max() < LEVELS and in_levels.abs().mean() < 0.4
    undone = ours * torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1) + torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    assert undone.min() > -1e-5 and undone.max() < 1 + 1e-5


def test_a_video_is_scored_by_itself_and_by_its_prompt(reward: CLIPScore) -> None:
    frames = videos()
    scores = reward(frames, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(reward(frames[index : index + 1], [prompt])[0], scores[index], rtol=0, atol=ROUNDING)
    others = torch.cat([frames[:1], videos(2)])
    torch.testing.assert_close(reward(others, PROMPTS)[0], scores[0], rtol=0, atol=ROUNDING, msg="the other videos do not matter")
    again = reward(frames, [*PROMPTS[1:], PROMPTS[0]])
    assert (again - scores).abs().max() > 10 * ROUNDING, "the prompt does"
    assert scores.dtype == torch.float32 and not scores.requires_grad


def test_frames_are_spread_evenly() -> None:
    assert sampled_frames(81).tolist() == [0, 11, 23, 34, 46, 57, 69, 80]
    assert sampled_frames(1).tolist() == [0] and sampled_frames(2).tolist() == [0, 1]
    for count in [random.randint(3, 2000) for _ in range(50)]:
        chosen = sampled_frames(count)
        assert chosen[0] == 0 and chosen[-1] == count - 1 and (chosen.diff() > 0).all() and chosen.diff().max() <= 12


def test_frames_that_are_not_looked_at_do_not_matter(reward: CLIPScore) -> None:
    frames = videos(1, 81)
    changed = frames.clone()
    seen = sampled_frames(81)
    unseen = [index for index in range(81) if index not in seen.tolist()]
    changed[:, unseen] = torch.rand_like(changed[:, unseen])
    torch.testing.assert_close(reward(changed, PROMPTS[:1]), reward(frames, PROMPTS[:1]), rtol=0, atol=ROUNDING)
    differences = []
    for _ in range(4):  # the score of one frame can come out the same by chance
        changed[:, seen[-1]] = torch.rand_like(changed[:, seen[-1]])
        differences.append((reward(changed, PROMPTS[:1]) - reward(frames, PROMPTS[:1])).abs())
    assert max(differences) > 10 * ROUNDING


def test_prompts_end_after_77_tokens(reward: CLIPScore) -> None:
    frames, prompt = videos(1), "".join(random.choices("abcdefghij", k=75))
    long = reward(frames, [prompt + "klm"])
    torch.testing.assert_close(reward(frames, [prompt + "xyz" * 40]), long, rtol=0, atol=ROUNDING)
    others = torch.cat([reward(frames, [prompt[:-1] + letter]) for letter in "klmnopqr"])  # a single one may come out nearly the same
    assert (others - long).abs().max() > 10 * ROUNDING, "the 75th letter counts"


def test_nothing_is_trained(reward: CLIPScore) -> None:
    assert not any(parameter.requires_grad for parameter in reward.parameters()) and not reward.training
    assert {parameter.dtype for parameter in reward.parameters()} == {torch.float32}
    assert not any(name.startswith(("mean", "std")) for name in reward.state_dict())


def test_it_is_found_by_its_published_name(checkpoint: Path, reward: CLIPScore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCOPO_MODELS", str(checkpoint.parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    frames = videos(1)
    assert SOURCE.endswith("/".join(checkpoint.parts[-2:]))
    torch.testing.assert_close(CLIPScore()(frames, PROMPTS[:1]), reward(frames, PROMPTS[:1]), rtol=0, atol=ROUNDING)


def test_weights_in_the_older_form(checkpoint: Path, reward: CLIPScore, tmp_path: Path) -> None:
    old = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    state = load_file(old / "model.safetensors") | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    (old / "model.safetensors").unlink()
    torch.save(state, old / "pytorch_model.bin")
    frames = videos(1)
    torch.testing.assert_close(CLIPScore(old)(frames, PROMPTS[:1]), reward(frames, PROMPTS[:1]), rtol=0, atol=ROUNDING)


def test_other_weights_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    state = load_file(weights)
    name = random.choice(sorted(name for name in state if name.endswith(".weight")))
    state["renamed"] = state.pop(name)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="2 names"):
        CLIPScore(broken)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="holds no CLIP model"):
        CLIPScore(broken)
    with pytest.raises(UserError, match="nowhere"):
        CLIPScore(tmp_path / "nowhere")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_gpu_computes_the_same(dtype: torch.dtype, bound: float, checkpoint: Path, reward: CLIPScore) -> None:
    frames = videos()
    there = CLIPScore(checkpoint, dtype=dtype).to("cuda")(frames.to("cuda"), PROMPTS)
    assert there.dtype == torch.float32 and (there.cpu() - reward(frames, PROMPTS)).abs().max() < bound
