"""HPSv3 from a tiny checkpoint in its official layout, against transformers' own network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.judges import (
    FRAME_TEMPLATE,
    Reference,
    assert_missing_file_is_named,
    assert_sources_are_all_that_is_read,
    write_base,
    write_instruction,
)
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import score
from arcopo_fast.rewards.hpsv3 import BASE, PIXELS, TOKEN, WEIGHTS, FrameJudge, HPSv3
from arcopo_fast.rewards.qwen2vl.frames import fitting_size
from arcopo_fast.rewards.registry import load_rewards

PROMPTS = ["a cat", "a much longer prompt: two dogs run along a beach at dawn"]


pytestmark = pytest.mark.usefixtures("published")


@pytest.fixture
def reference(published: Path) -> Reference:
    """A judge, and its checkpoint at the place of the published one."""
    write_base(published / BASE)
    head = nn.Sequential(nn.Linear(48, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
    reference = Reference([TOKEN], head)
    directory = published / "MizzenAI/HPSv3"
    directory.mkdir(parents=True)
    save_file(reference.official_state(), directory / WEIGHTS)
    constants = dict(zip(("INSTRUCTION", "prompt_with_special_token"), FRAME_TEMPLATE))
    write_instruction(directory / "hpsv3/dataset/data_collator_qwen.py", **constants, INSTRUCTION_debug="{text_prompt}")
    return reference


def make_frames(videos: int, count: int) -> Tensor:
    """Noise around a colour of each frame. Noise alone looks the same to any judge."""
    return 0.7 * torch.rand(videos, count, 3, 1, 1) + 0.3 * torch.rand(videos, count, 3, 60, 104)


def expected(reference: Reference, frames: Tensor, prompt: str) -> Tensor:
    """Scores [F] of frames [F, 3, H, W] in one batch; the mean of (mean, spread)."""
    size = fitting_size(*frames.shape[-2:], least=PIXELS, most=PIXELS)
    images = nn.functional.interpolate((frames * 255).round(), size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()
    text = FRAME_TEMPLATE[0].format(text_prompt=prompt) + FRAME_TEMPLATE[1]
    return reference.scores([text] * len(frames), list(images[:, None]), "image")[:, 0, 0]


def test_frames_are_of_the_size_of_the_official_code() -> None:
    assert fitting_size(480, 832, least=PIXELS, most=PIXELS) == (336, 588)


def test_scores_are_those_of_the_official_code(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameJudge, "frames_at_once", 3)  # 7 frames in three batches
    frames = make_frames(2, 7)
    by_frame = torch.stack([expected(reference, video, prompt) for video, prompt in zip(frames, PROMPTS)])
    assert by_frame.std(1).min() > 1e-3, "the scores of this judge tell nothing apart"
    scores = score(load_rewards(HPSv3.scores), frames, PROMPTS)
    torch.testing.assert_close(scores["hpsv3"], by_frame.sort(1).values[:, -2:].mean(1), rtol=1e-4, atol=1e-4)  # 2 of 7 are 30 %
    torch.testing.assert_close(scores["hpsv3_every_4th"], by_frame[:, ::4].max(1).values, rtol=1e-4, atol=1e-4)
    every = HPSv3(top=1.0)
    every.strides = {"all": 1, "some": 3}
    others = every.ask(["all", "some"], frames, PROMPTS)
    torch.testing.assert_close(others["all"], by_frame.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(others["some"], by_frame[:, ::3].mean(1), rtol=1e-4, atol=1e-4)


def test_a_score_depends_on_its_video_and_prompt_alone(reference: Reference) -> None:
    frames, rewards = make_frames(2, 3), load_rewards(["hpsv3"])

    def judge(videos: Tensor, prompts: list[str]) -> Tensor:
        return score(rewards, videos, prompts)["hpsv3"]

    together = judge(frames, PROMPTS)
    for video in (1, 0):
        assert torch.equal(judge(frames[video : video + 1], PROMPTS[video : video + 1])[0], together[video])
    assert judge(frames[:1], PROMPTS[1:])[0] != together[0], "the prompt counts"


def test_the_model_is_shared_and_has_no_graph(reference: Reference) -> None:
    rewards = load_rewards(["hpsv3", "hpsv3_every_4th"])
    judge = rewards["hpsv3"]
    assert rewards["hpsv3_every_4th"] is judge and isinstance(judge, HPSv3)
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert not any(tensor.is_meta for tensor in (*judge.parameters(), *judge.buffers()))
    for parameter in judge.parameters():
        parameter.requires_grad_(True)
    assert all(values.grad_fn is None for values in judge(make_frames(1, 1), ["a"]).values())


def test_only_the_frames_of_what_is_asked_are_looked_at(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    forward = FrameJudge.forward
    monkeypatch.setattr(FrameJudge, "forward", lambda self, frames, prompt: (looked.append(len(frames)), forward(self, frames, prompt))[1])
    rewards, frames = load_rewards(HPSv3.scores), make_frames(1, 5)
    score({"hpsv3_every_4th": rewards["hpsv3_every_4th"]}, frames, ["a"])
    assert looked == [2]


def test_on_a_gpu_the_towers_are_bf16_and_the_head_is_not(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dtypes = {name.startswith("rm_head"): parameter.dtype for name, parameter in HPSv3().model.judge.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_one_bad_frame_makes_the_video_fail() -> None:
    reward = HPSv3.__new__(HPSv3)
    reward.top = 0.3
    scores = torch.rand(10)
    scores[torch.randint(10, ())] = torch.nan
    assert reward._reduce(scores).isnan()


@pytest.mark.parametrize("name", ["visual.blocks.1.attn.qkv.bias", "model.layers.0.input_layernorm.weight", "rm_head.3.weight"])
def test_every_tensor_must_be_there_under_its_name(name: str, reference: Reference, published: Path) -> None:
    file = published / "MizzenAI/HPSv3" / WEIGHTS
    state = load_file(file)
    state["x" + name] = state.pop(name)
    save_file(state, file)
    with pytest.raises(UserError) as raised:
        HPSv3()
    ours = name.replace("model.", "language_model.")
    assert f"1 missing ({ours}); 1 unexpected (x{name})" in str(raised.value) and WEIGHTS in str(raised.value)


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (f"MizzenAI/HPSv3/{WEIGHTS}", ["hf://MizzenAI/HPSv3", f"{WEIGHTS} (16.5 GB)"]),
        (f"{BASE}/config.json", [f"hf://{BASE}", "config.json"]),
        ("MizzenAI/HPSv3/hpsv3/dataset/data_collator_qwen.py", ["github://MizzenAI/HPSv3", "data_collator_qwen.py"]),
    ],
)
def test_missing_files_are_named(file: str, parts: list[str], reference: Reference, published: Path) -> None:
    assert_missing_file_is_named(HPSv3, published / file, parts)


def test_the_files_it_says_it_reads_are_all_it_reads(reference: Reference, published: Path) -> None:
    assert_sources_are_all_that_is_read(HPSv3, published, make_frames(1, 1))
