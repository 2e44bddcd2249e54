"""Held-out measures of the toy world: shape fidelity, motion agreement, caption accuracy; and, of many videos, variety.

They are never trained on and show what alignment must not break, so they share nothing with the rewards: template matching on the
picture instead of moments of a chroma mask, for places and speeds too, and a small learned classifier instead of hue and overlap formulas.
The first three lie in [0, 1], and more is better; they are called like rewards. `Variety` compares videos with one another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.toy import data

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

CLASSIFIER_FILE_NAME = "caption_classifier.safetensors"


class ShapeFidelity(Reward):
    """Correlation of each frame with the best match of the caption's shape, over positions and sizes; mean over frames."""

    scores = ("shape_fidelity",)
    frame_stride = 4
    _window = 33  # pixels; holds the largest shape and a little background
    _radii = (7.5, 8.75, 10.0, 11.25)

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return self.find(frames[:, :: self.frame_stride], prompts)[..., 0].mean(1).clamp(0, 1)

    def find(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the best match's correlation, x, y and radius in each frame: [N, F, 4], in pixels."""
        shapes = [data.attributes_of(prompt)[0] for prompt in prompts]
        typical = frames.flatten(3).median(dim=3).values[..., None, None]
        contrast = (frames - typical).square().sum(2).sqrt()  # [N, F, H, W]: distance from the typical color, which is the background's
        found = torch.zeros(*frames.shape[:2], 4, device=frames.device)
        for shape in set(shapes):
            chosen = [i for i, name in enumerate(shapes) if name == shape]
            found[chosen] = self._best_match(contrast[chosen].flatten(0, 1), shape).unflatten(0, (len(chosen), -1))
        return found

    def _best_match(self, images: Tensor, shape: str) -> Tensor:
        """Return the largest normalized cross-correlation of each image [B, H, W] with the shape at any position and size, and where it
        is: correlation, x, y, radius, [B, 4].
        """
        pixel = torch.arange(self._window, dtype=torch.float32) - (self._window - 1) / 2
        y, x = torch.meshgrid(pixel, pixel, indexing="ij")
        drop = 0.3 if shape == "triangle" else 0.0  # a triangle's bounding box is not centered on its centroid
        templates = torch.stack([(0.5 - data.outline_distance(shape, x, y - drop * r, torch.tensor(r))).clamp(0, 1) for r in self._radii])
        templates = templates - templates.mean(dim=(1, 2), keepdim=True)
        templates = (templates / templates.norm(dim=(1, 2), keepdim=True)).to(images.device)

        margin = self._window // 2
        padded = F.pad(images[:, None], (margin,) * 4, mode="replicate")
        size = padded.shape[-2:]
        box = torch.ones_like(templates[:1])
        kernels = torch.fft.rfft2(torch.cat([templates, box]), s=size).conj()  # correlation, not convolution
        height, width = images.shape[-2:]
        sums = torch.fft.irfft2(torch.fft.rfft2(padded) * kernels, s=size)[..., :height, :width]
        squares = torch.fft.irfft2(torch.fft.rfft2(padded.square()) * kernels[-1], s=size)[..., :height, :width]
        energy = squares - sums[:, -1:].square() / self._window**2
        best, index = (sums[:, :-1] / energy.clamp_min(1e-3).sqrt()).flatten(1).max(1)
        radius = torch.tensor(self._radii, device=images.device)[index // (height * width)]
        return torch.stack([best, index % width + 0.5, index // width % height + 0.5, radius], dim=1)


class MotionAgreement(Reward):
    """Agreement of the shape's speed in the caption's direction with that of the data: 1 where they are equal, x where one is x times the
    other, and 0 where the shape stands still or moves the other way.
    """

    scores = ("motion_agreement",)
    frame_stride = 2
    _wanted = sum(data.SPEED_RANGE) / 2  # pixels a frame

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        ratio = self.speeds(frames, prompts) / self._wanted
        return torch.minimum(ratio, 1 / ratio.clamp_min(1e-6)).clamp_min(0)

    def speeds(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the speed along the caption's direction, [N], in pixels a frame: the median over pairs of places half a video apart."""
        place = ShapeFidelity().find(frames[:, :: self.frame_stride], prompts)[..., 1:3]
        half = place.shape[1] // 2
        if half == 0:
            return torch.zeros(len(frames), device=frames.device)
        direction = torch.tensor([data.MOTIONS[data.attributes_of(prompt)[2]] for prompt in prompts], device=frames.device)
        moved = torch.einsum("nfk,nk->nf", place[:, half:] - place[:, :-half], direction)
        return moved.median(1).values / (half * self.frame_stride)


class CaptionClassifier(nn.Module):
    """A network that names color, shape and motion from the first, the middle and the last frame. 75 k parameters."""

    heads = (data.SHAPES, tuple(data.COLORS), tuple(data.MOTIONS))

    def __init__(self) -> None:
        super().__init__()
        widths = (9, 16, 32, 40, 48)
        layers: list[nn.Module] = []
        for wide, next_wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(wide, next_wide, 3, stride=2, padding=1), nn.GroupNorm(4, next_wide), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * (data.IMAGE_SIZE // 16) ** 2, 48), nn.SiLU())
        self.logits = nn.Linear(48, sum(len(head) for head in self.heads))

    @staticmethod
    def select(frames: Tensor) -> Tensor:
        """Return the three frames that are looked at: [N, F, 3, 64, 64] -> [N, 9, 64, 64]."""
        final = frames.shape[1] - 1
        return frames[:, [0, final // 2, final]].flatten(1, 2)

    def forward(self, stills: Tensor) -> tuple[Tensor, ...]:
        """Return logits of shape, color and motion, each [N, classes], for stills [N, 9, 64, 64] in [0, 1]."""
        logits = self.logits(self.features(stills * 2 - 1))
        return logits.split([len(head) for head in self.heads], dim=1)

    @classmethod
    def labels(cls, captions: list[str]) -> Tensor:
        """Return the class indices [N, 3] (shape, color, motion) of captions."""
        rows = [[head.index(name) for head, name in zip(cls.heads, data.attributes_of(caption), strict=True)] for caption in captions]
        return torch.tensor(rows)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the weights, in fp16, to one safetensors file in `directory`."""
        path = Path(directory) / CLASSIFIER_FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CaptionClassifier:
        """Read what `save_pretrained` wrote: fp32, frozen, in eval mode. Raises UserError if the file is missing or does not fit."""
        path = Path(directory) / CLASSIFIER_FILE_NAME
        classifier = cls()
        try:
            classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"cannot read a caption classifier from {path}: {error}; expected what CaptionClassifier.save_pretrained writes"
            ) from error
        return classifier.eval().requires_grad_(False)


class CaptionAccuracy(Reward):
    """Share of the caption's three attributes that the classifier also names: 0, 1/3, 2/3 or 1."""

    scores = ("caption_accuracy",)

    def __init__(self, classifier: CaptionClassifier) -> None:
        self.classifier = classifier

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        stills = self.classifier.select(frames).to(next(self.classifier.parameters()).device)
        answers = torch.stack([logits.argmax(1) for logits in self.classifier(stills)], dim=1)
        return (answers == self.classifier.labels(prompts).to(answers.device)).float().mean(1)


class Variety:
    """Spread of the shapes' places and sizes between videos, and the entropy of the shapes: a `SetMeasure`.

    Args:
        directory: of the classifier.
    """

    def __init__(self, directory: str | Path) -> None:
        self.classifier = CaptionClassifier.from_pretrained(directory)

    @torch.no_grad()
    def describe(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return each video's mean x, y and radius of the shape, in pixels, and how likely it shows each shape: [N, 7]."""
        found = ShapeFidelity().find(frames[:, :: ShapeFidelity.frame_stride], prompts).mean(1)[:, 1:]
        device = next(self.classifier.parameters()).device
        share = self.classifier(self.classifier.select(frames).to(device))[0].softmax(1)
        return torch.cat([found.float().cpu(), share.cpu()], dim=1)

    def compare(self, described: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the distance of each shape's place, and of its radius, from the mean over videos, in pixels; and its shape's surprise in
        nats, -log of the share that this shape has, whose mean is the entropy: at most ln 4, for four shapes as common.
        """
        place, radius, share = described.split([2, 1, len(data.SHAPES)], dim=1)
        surprise = -share.mean(0).clamp_min(1e-12).log()
        return {
            "position_spread": (place - place.mean(0)).norm(dim=1),
            "size_spread": (radius - radius.mean()).abs()[:, 0],
            "shape_entropy": share @ surprise,
        }


def held_out(directory: str | Path) -> dict[str, Reward]:
    """Return the three measures by name; the classifier is read from `directory`."""
    measures: tuple[Reward, ...] = (ShapeFidelity(), MotionAgreement(), CaptionAccuracy(CaptionClassifier.from_pretrained(directory)))
    return {name: measure for measure in measures for name in measure.scores}


def train_classifier(
    out_dir: str | Path,
    *,
    vae: AutoencoderKLWan | None = None,
    videos: int = 4096,
    steps: int = 1500,
    seed: int = 0,
    held_out_videos: int = 512,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train the classifier on rendered videos, a third of them passed through the VAE, and save it; about three minutes with one thread.

    Args:
        out_dir: receives the weights.
        vae: makes the reconstructions; without one only rendered videos are used.
        videos: size of the training pool; pictures are also shifted, blurred, made noisy and rescaled in brightness.
        steps: optimizer steps with batches of 64.
        seed: of weights and data.
        held_out_videos: how many measure each accuracy.
        log: receives a line now and then.

    Returns:
        accuracy of each attribute on held-out videos: `rendered_shape`, ..., and `reconstructed_shape`, ... if there is a VAE.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    stills, labels = _pool(videos, vae, generator, reconstructed_share=1 / 3)
    classifier = CaptionClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(stills), (64,), generator=generator)
        logits = classifier(_augment(stills[chosen].float(), generator))
        loss = torch.stack([F.cross_entropy(head, target) for head, target in zip(logits, labels[chosen].unbind(1), strict=True)]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"classifier step {step} loss {float(loss.detach()):.4f}")

    classifier = classifier.eval().requires_grad_(False).half().float()
    metrics: dict[str, float] = {}
    unseen = torch.Generator().manual_seed(seed + 1)
    for kind, share in [("rendered", 0.0)] + ([("reconstructed", 1.0)] if vae is not None else []):
        stills, labels = _pool(held_out_videos, vae, unseen, reconstructed_share=share)
        correct = torch.stack([head.argmax(1) for head in classifier(stills.float())], dim=1) == labels
        for attribute, accuracy in zip(("shape", "colour", "motion"), correct.float().mean(0), strict=True):
            metrics[f"{kind}_{attribute}"] = float(accuracy)
    classifier.save_pretrained(out_dir)
    log(" ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return metrics


@torch.no_grad()
def _pool(videos: int, vae: AutoencoderKLWan | None, generator: torch.Generator, *, reconstructed_share: float) -> tuple[Tensor, Tensor]:
    """Return stills [N, 9, 64, 64] fp16 and labels [N, 3] of videos of several lengths."""
    from arcopo_fast.toy.vae_training import decode, encode  # and with it diffusers, which only the training of the classifier needs

    stills, captions = [], []
    batch = 32
    for index in range(math.ceil(videos / batch)):
        frames, names, _ = data.sample(batch, (6, 8, 12)[index % 3], generator)
        reconstruct = int((index + 1) * reconstructed_share) > int(index * reconstructed_share)  # spread evenly
        if vae is not None and reconstruct:
            frames = decode(vae, encode(vae, frames))
        stills.append(CaptionClassifier.select(frames).half())
        captions += names
    return torch.cat(stills), CaptionClassifier.labels(captions)


def _augment(stills: Tensor, generator: torch.Generator) -> Tensor:
    """Apply the same random shift, blur, brightness, contrast and amount of noise to the three pictures of a video."""
    n = len(stills)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    reach = 3
    padded = F.pad(stills, (reach,) * 4, mode="replicate")
    size = stills.shape[-1]
    stills = padded[:, :, reach + shift[0] : reach + shift[0] + size, reach + shift[1] : reach + shift[1] + size]
    blurred = F.avg_pool2d(stills, 3, stride=1, padding=1, count_include_pad=False)

    def amount(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    stills = torch.lerp(stills, blurred, amount(0, 1))
    stills = 0.4 + amount(0.7, 1.2) * (stills - 0.4) + amount(-0.1, 0.1)
    return (stills + amount(0, 0.06) * torch.randn(stills.shape, generator=generator)).clamp(0, 1)
