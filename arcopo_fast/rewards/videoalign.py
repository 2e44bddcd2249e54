"""VideoAlign's VideoReward: visual quality (VQ), motion quality (MQ) and text alignment (TA) of a video, from one look at it.

A Qwen2-VL-2B with a LoRA and a linear head that is read at three tokens of its own, <|VQ_reward|>, <|MQ_reward|> and <|TA_reward|>. The
prompt stands behind the first two, so VQ and MQ do not depend on it. One forward pass of a video gives all three; MQ of the frames in gray
takes a second one.

Needs hf://KlingTeam/VideoReward (model_config.json, checkpoint-11352/model.pth, 5 GB), the small files of hf://Qwen/Qwen2-VL-2B-Instruct,
and github://KwaiVGI/VideoAlign/prompt_template.py, which holds the instruction.

    Liu et al., Improving Video Generation with Human Feedback, arXiv 2501.13918
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rewards.qwen2vl import model as qwen2vl
from arcopo_fast.rewards.qwen2vl.frames import Patches, fitting_size, grayscale, quantize, resize, sample_frames
from arcopo_fast.rewards.qwen2vl.text import Conversation, load_tokenizer, read_instruction
from arcopo_fast.storage import hub
from arcopo_fast.storage.textfiles import read_json

SOURCE = "hf://KlingTeam/VideoReward"
INSTRUCTION = "github://KwaiVGI/VideoAlign/prompt_template.py"
DIMENSIONS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)  # added in this order (train_reward.py)
TEMPLATES = {"detailed_special": "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"}
"""Constants of prompt_template.py by the names that model_config.json gives them; the others have no tokens to read at."""
LEAST_PIXELS = 128 * 28 * 28
"""The pixels of a frame, at least (vision_process.py, VIDEO_MIN_PIXELS)."""


class VideoAlign(nn.Module):
    """The network, from frames to raw scores.

    rate, most_pixels: frames that are looked at in a second, and the most pixels of one.
    means, stds: [3] of raw VQ, MQ and TA, from model_config.json's `inference_config`; z = (raw - mean) / std is the normalized score.
    """

    means: Tensor
    stds: Tensor

    def __init__(
        self,
        judge: qwen2vl.Qwen2VLJudge,
        patches: Patches,
        conversation: Conversation,
        *,
        rate: float,
        most_pixels: int,
        means: list[float],
        stds: list[float],
    ) -> None:
        super().__init__()
        self.judge = judge
        self.patches = patches
        self.conversation = conversation
        self.rate, self.most_pixels = rate, most_pixels
        self.register_buffer("means", torch.tensor(means), persistent=False)
        self.register_buffer("stds", torch.tensor(stds), persistent=False)

    @classmethod
    def load(cls, source: str) -> VideoAlign:
        """Read it from a directory or repository in the official layout; weights of checkpoint-N for the largest N.

        Raises:
            UserError: something is missing, or is not what it should be.
        """
        directory = (
            hub.local(source, ["model_config.json", "checkpoint-*/model.pth"])
            or hub.local(source, ["model_config.json", "checkpoint-*/adapter_model.safetensors"])
            or hub.find(source, ["model_config.json", "checkpoint-11352/model.pth"])
        )
        file = directory / "model_config.json"
        settings = read_json(file)
        try:
            data, model, adapter, scale = (settings[f"{name}_config"] for name in ("data", "model", "peft_lora", "inference"))
            template, base = data["prompt_template_type"], model["model_name_or_path"]
            rate, most_pixels = float(data["fps"]), int(data["max_frame_pixels"])
            means, stds = ([float(scale[f"{dimension}_{name}"]) for dimension in DIMENSIONS] for name in ("mean", "std"))
            lora = qwen2vl.LoRA.from_config(adapter) if adapter["lora_enable"] else None
            supported = data.get("sample_type", "uniform") == "uniform" and data.get("num_frames") is None and model["output_dim"] == 1
        except KeyError as error:
            raise UserError(f"{file} has no {error.args[0]}; get it again") from None
        if template not in TEMPLATES or not supported:
            advice = f"expected uniform sampling, output_dim 1 and the template {', '.join(TEMPLATES)}, as published"
            raise UserError(f"{file} describes another kind of judge (template {template!r}); {advice}")

        found = qwen2vl.find_base(base)
        patches = qwen2vl.load_patches(found)
        tokenizer = load_tokenizer(found, TOKENS)
        instruction = read_instruction(directory, INSTRUCTION, [TEMPLATES[template]])
        conversation = Conversation(tokenizer, instruction, "<|video_pad|>", TOKENS)
        judge = qwen2vl.build(found, tokenizer, lambda width: nn.Linear(width, 1, bias=False))
        checkpoint = max(directory.glob("checkpoint-*"), key=_step)
        files = _read_checkpoint(checkpoint, base, tokenizer.get_vocab_size())
        qwen2vl.load_strict(judge, files, checkpoint, dtype=qwen2vl.tower_dtype(), lora=lora)
        return cls(judge, patches, conversation, rate=rate, most_pixels=most_pixels, means=means, stds=stds)

    @torch.no_grad()
    def raw_scores(self, frames: Tensor, prompts: list[str], fps: float, *, gray: bool = False) -> Tensor:
        """Return raw VQ, MQ and TA [N, 3] fp32 of frames [N, F, 3, H, W] in [0, 1].

        One video at a time, without padding: no score depends, in any bit, on the videos beside it.
        """
        return torch.stack([self._score(video, prompt, fps, gray) for video, prompt in zip(frames, prompts)])

    def _score(self, video: Tensor, prompt: str, fps: float, gray: bool) -> Tensor:
        """[3] of frames [F, 3, H, W]."""
        device = self.judge.device
        sampled = quantize(video[sample_frames(len(video), fps, self.rate).to(video.device)])
        if gray:
            sampled = grayscale(sampled)
        size = fitting_size(*video.shape[-2:], least=LEAST_PIXELS, most=self.most_pixels, factor=self.patches.factor)
        patches, grid = self.patches.cut(resize(sampled, size))
        ids, places = self.conversation.encode(prompt, self.patches.features(grid))
        inputs = (patches.to(device), torch.tensor([grid], device=device), torch.tensor([ids], device=device))
        return self.judge(*inputs, self.conversation.pad, places)[0, :, 0]


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1


def _read_checkpoint(checkpoint: Path, base: str, rows: int) -> dict[str, Tensor]:
    """The tensors of a whole model, or of an adapter and what was trained beside it, over the base model's.

    rows: of the embedding; the base model's has more.
    """
    single_file = checkpoint / "model.pth"
    if single_file.is_file():
        return qwen2vl.read_tensors(single_file)
    parts = [checkpoint / name for name in ("non_lora_state_dict.pth", "adapter_model.safetensors")]
    if absent := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{checkpoint} has neither model.pth nor {' and '.join(absent)}; get {SOURCE} again")
    directory = qwen2vl.find_base(base, ["*.safetensors"])
    tensors: dict[str, Tensor] = {}
    for file in [*sorted(directory.glob("*.safetensors")), *parts]:
        # Under one set of names, so that what was trained takes the place of the base model's.
        tensors |= {qwen2vl.judge_name(name): tensor for name, tensor in qwen2vl.read_tensors(file).items()}
    embedding = "language_model.embed_tokens.weight"
    return tensors | {embedding: tensors[embedding][:rows]} if embedding in tensors else tensors


# The reward ------------------------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """The way a score is read off the network.

    dimension: one of `DIMENSIONS`. raw: before its normalization. gray: frames are gray, so that color earns nothing; as in Astrolabe.
    """

    dimension: str
    raw: bool = False
    gray: bool = False


class VideoAlignReward(nn.Module, Reward):
    """VideoAlign's visual quality (vq), motion quality (mq; of the frames in gray: mq_grey), text alignment (ta); raw: not normalized.

    A reward of one's own may have another `source` (a directory, or another repository) in a subclass, or other `readings` and their names
    as `scores`.
    """

    readings = {
        "videoalign_vq": Reading("VQ"),
        "videoalign_mq": Reading("MQ"),
        "videoalign_mq_grey": Reading("MQ", gray=True),
        "videoalign_ta": Reading("TA"),
        "videoalign_vq_raw": Reading("VQ", raw=True),
        "videoalign_mq_raw": Reading("MQ", raw=True),
        "videoalign_ta_raw": Reading("TA", raw=True),
    }
    scores = tuple(readings)
    source = SOURCE
    fps = 16.0
    sources = (
        (SOURCE, ("model_config.json", "checkpoint-11352/model.pth")),
        ("hf://Qwen/Qwen2-VL-2B-Instruct", qwen2vl.BASE_FILES),
        (INSTRUCTION, ()),
    )
    bytes = 5_200_000_000  # predicted: 4.4 GB of weights in bf16, the rest for one video of ten frames

    def __init__(self) -> None:
        super().__init__()
        self.model = VideoAlign.load(self.source)

    def forward(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Judge frames [N, F, 3, H, W] in [0, 1]: every score [N] fp32 by its name."""
        return self.ask(self.scores, frames, prompts)

    def ask(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        passes = {self.readings[name].gray for name in names}
        raw = {gray: self.model.raw_scores(frames, prompts, self.fps, gray=gray) for gray in passes}
        return {name: self._read(self.readings[name], raw).to(frames.device) for name in names}

    def _read(self, reading: Reading, raw: dict[bool, Tensor]) -> Tensor:
        column = DIMENSIONS.index(reading.dimension)
        scores = raw[reading.gray][:, column]
        return scores if reading.raw else (scores - self.model.means[column]) / self.model.stds[column]
