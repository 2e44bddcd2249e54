"""HPSv3: human preference of single frames, for a prompt; a video's score is the mean of its best frames.

A Qwen2-VL-7B with a small head, read at a token of its own, that gives the mean and the spread of a frame's preference; the mean is its
score. Frames are scored a few at a time, each alone with the prompt.

Needs hf://MizzenAI/HPSv3 (HPSv3.safetensors, 16.5 GB), the small files of hf://Qwen/Qwen2-VL-7B-Instruct, and
github://MizzenAI/HPSv3/hpsv3/dataset/data_collator_qwen.py, which holds the instruction.

    Ma et al., HPSv3: Towards Wide-Spectrum Human Preference Score, arXiv 2508.03789
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.qwen2vl import model as qwen2vl
from arcopo_fast.rewards.qwen2vl.frames import Patches, fitting_size, quantize, resize
from arcopo_fast.rewards.qwen2vl.text import Conversation, load_tokenizer, read_instruction
from arcopo_fast.storage import hub

SOURCE = "hf://MizzenAI/HPSv3"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
WEIGHTS = "HPSv3.safetensors"
TOKEN = "<|Reward|>"
INSTRUCTION = "github://MizzenAI/HPSv3/hpsv3/dataset/data_collator_qwen.py"
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")  # of that file, in this order (inference.py, prepare_batch)
PIXELS = 256 * 28 * 28
"""The pixels of a frame, at least and at most (inference.py, prepare_batch)."""


class FrameJudge(nn.Module):
    """Scores of single frames. frames_at_once: bounds the working set."""

    frames_at_once = 8

    def __init__(self, judge: qwen2vl.Qwen2VLJudge, patches: Patches, conversation: Conversation) -> None:
        super().__init__()
        self.judge = judge
        self.patches = patches
        self.conversation = conversation

    @classmethod
    def load(cls, source: str) -> FrameJudge:
        """Read it from a directory or repository with HPSv3.safetensors.

        Raises:
            UserError: something is missing, or is not what it should be.
        """
        directory = hub.find(source, [WEIGHTS])
        base = qwen2vl.find_base(BASE)
        tokenizer = load_tokenizer(base, [TOKEN])
        instruction = read_instruction(directory, INSTRUCTION, CONSTANTS)
        conversation = Conversation(tokenizer, instruction, "<|image_pad|>", [TOKEN])
        judge = qwen2vl.build(base, tokenizer, _head)
        qwen2vl.load_strict(judge, qwen2vl.read_tensors(directory / WEIGHTS), directory / WEIGHTS, dtype=qwen2vl.tower_dtype())
        return cls(judge, qwen2vl.load_patches(base), conversation)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompt: str) -> Tensor:
        """Judge frames [F, 3, H, W] in [0, 1] of one prompt: scores [F] fp32, on the judge's device."""
        size = fitting_size(*frames.shape[-2:], least=PIXELS, most=PIXELS, factor=self.patches.factor)
        return torch.cat([self._score(resize(quantize(part), size), prompt) for part in frames.split(self.frames_at_once)])

    def _score(self, frames: Tensor, prompt: str) -> Tensor:
        """[F] of resized frames, as many at once as there are: they share the prompt, so there is no padding."""
        device = self.judge.device
        cut = [self.patches.cut(frame[None]) for frame in frames]
        patches, grids = torch.cat([patches for patches, _ in cut]), [grid for _, grid in cut]
        ids, places = self.conversation.encode(prompt, self.patches.features(grids[0]))
        tokens = torch.tensor(ids, device=device).expand(len(frames), -1)
        scores = self.judge(patches.to(device), torch.tensor(grids, device=device), tokens, self.conversation.pad, places)
        return scores[:, 0, 0]  # mean and spread


def _head(width: int) -> nn.Module:
    """(qwen2vl_trainer.py, rm_head_type "ranknet")"""
    return nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))


class HPSv3(nn.Module, Reward):
    """HPSv3, the mean over the best 30 % of a video's frames, as in Astrolabe; every_4th: of every fourth, for a quarter of the cost.

    The two are different scores: fewer frames have a lower best.

    strides: for each score, from one frame that is looked at to the next.

    Args:
        top: share of these frames that counts; 1.0 is the mean of all. At least one counts.
    """

    strides = {"hpsv3": 1, "hpsv3_every_4th": 4}
    scores = tuple(strides)
    source = SOURCE
    sources = ((SOURCE, (WEIGHTS,)), (f"hf://{BASE}", qwen2vl.BASE_FILES), (INSTRUCTION, ()))
    bytes = 17_500_000_000  # predicted: 15.5 GB of weights in bf16, the rest for eight frames at once

    def __init__(self, *, top: float = 0.3) -> None:
        super().__init__()
        self.top = top
        self.model = FrameJudge.load(self.source)

    def forward(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Judge frames [N, F, 3, H, W] in [0, 1]: every score [N] fp32 by its name."""
        return self.ask(self.scores, frames, prompts)

    def ask(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {name: self._scores(frames[:, :: self.strides[name]], prompts).to(frames.device) for name in names}

    def _scores(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return torch.stack([self._reduce(self.model(video, prompt)) for video, prompt in zip(frames, prompts)])

    def _reduce(self, scores: Tensor) -> Tensor:
        """Return the mean of one video's best frames, of [F]; NaN if one of them is, for it counts as the largest."""
        return scores.topk(max(1, int(self.top * len(scores)))).values.mean()
