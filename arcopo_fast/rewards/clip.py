"""CLIP-score: how well the frames of a video fit its prompt, by a CLIP model (Radford et al., arXiv 2103.00020; Hessel et al., 2104.08718).

The mean over frames of cos(image, text), the plain cosine, without the factor 2.5 and the clip at 0 of 2104.08718: those change no ranking.
Values of the published model lie around 0.2 to 0.35.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.storage import hub

SOURCE = "hf://openai/clip-vit-large-patch14"
FILES = ["config.json", "tokenizer_config.json", "tokenizer.json"]
WEIGHTS = "model.safetensors", "pytorch_model.bin"
SPACING = 12


class CLIPScore(nn.Module, Reward):
    """Mean cosine of a video's frames and its prompt, of which CLIP reads 77 tokens, begin and end included.

    Frames are looked at that are at most `SPACING` apart, the first and the last among them: 8 of 81. That is a chunk of the published
    generators, so none is left out, and frames in between differ little from these.

    Weights are frozen and float32. On a GPU the arithmetic is in `dtype`: float16, in which CLIP was trained, or bfloat16.

    Args:
        source: a directory in the form of the published one, or hf://owner/name.
    """

    scores = ("clip",)
    bytes = 2 * 2**30
    """1.6 GiB of weights, and what one video takes."""

    sources = ((SOURCE, (*FILES, WEIGHTS[0])),)

    mean: Tensor
    std: Tensor

    def __init__(self, source: str | Path = SOURCE, *, dtype: torch.dtype = torch.float16) -> None:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        super().__init__()
        self.dtype = dtype
        directory = next((found for weights in WEIGHTS if (found := hub.local(source, [*FILES, weights]))), None)
        directory = directory or hub.find(source, [*FILES, WEIGHTS[0]])
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self.model, loading = CLIPModel.from_pretrained(directory, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{directory} holds no CLIP model ({error}); get {SOURCE} again") from error
        # Early releases of transformers kept the numbers 0 to 76 among the weights.
        wrong = [name for keys in ("missing_keys", "unexpected_keys") for name in loading[keys] if not name.endswith("position_ids")]
        if wrong:
            raise UserError(
                f"{directory}: {len(wrong)} names of its weights are missing or unknown to CLIP, such as {wrong[0]}; get {SOURCE}"
            )
        self.size: int = self.model.config.vision_config.image_size
        self.length: int = self.model.config.text_config.max_position_embeddings
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)
        self.float().eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """[N, F, 3, H, W] float32 in [0, 1] and N prompts -> [N] float32, from one video at a time."""
        return torch.stack([self._score(video, prompt) for video, prompt in zip(frames, prompts)])

    def _score(self, video: Tensor, prompt: str) -> Tensor:
        device = self.mean.device
        text = self.tokenizer(prompt, truncation=True, max_length=self.length, return_tensors="pt").to(device)
        pixels = self.pixels(video[sampled_frames(len(video))].to(device))
        with torch.autocast(device.type, self.dtype, enabled=device.type == "cuda"):
            both = self.model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
        return F.cosine_similarity(both.image_embeds.float(), both.text_embeds.float(), dim=-1).mean()

    def pixels(self, frames: Tensor) -> Tensor:
        """[F, 3, H, W] in [0, 1] -> [F, 3, size, size]: the shorter side to `size`, bicubic with antialiasing, the middle, normalized.

        Within a level and a half of 256 of CLIPImageProcessor: it rounds to whole levels after the rows and after the columns. It also
        cuts what overshoots both times, so the two are resized one after the other here too.
        """
        height, width = frames.shape[-2:]
        short = min(height, width)
        rows, columns = (int(self.size * side / short) for side in (height, width))
        for sides in ((height, columns), (rows, columns)):
            frames = F.interpolate(frames, sides, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (rows - self.size) // 2, (columns - self.size) // 2
        return (frames[..., top : top + self.size, left : left + self.size] - self.mean) / self.std


def sampled_frames(count: int) -> Tensor:
    """Return which of `count` frames are looked at: evenly spread, both ends included."""
    return torch.linspace(0, count - 1, 1 + math.ceil((count - 1) / SPACING)).round().long()
