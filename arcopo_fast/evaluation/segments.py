"""Long videos, judged segment by segment while they are made: no frame is kept, so memory does not grow with their length.

The generator streams chunks, and the decoder goes on from the state in which the segment before has left it, so that frames are those of
the whole video's decoding. A segment is so many latent frames; the first one has fewer pixel frames, as its first latent gives only one.
Rewards judge each segment as a video of its own, by the prompt that counts there. Where the prompt changes within a segment, they judge its
parts, each by its own prompt; the score is their mean, weighted by frames.

Beside the rewards, which may like what drift does to a video, stand measures that are never trained on, see `measures`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arcopo_fast.build import Generator
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.drift import CHROMA, CLIPPED, CONTRAST, LUMINANCE, SIMILARITY
from arcopo_fast.evaluation.few_steps import ACUTANCE
from arcopo_fast.evaluation.judging import Judging
from arcopo_fast.evaluation.looks import MOTION, SIDE, motion_and_detail
from arcopo_fast.evaluation.sharpness import acutance
from arcopo_fast.evaluation.windows import Part, View, parts
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, StackedNoise
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime import profiling


@dataclass(frozen=True)
class Segments:
    """The segments of a video: `count` of `latent_frames` each."""

    latent_frames: int
    count: int

    @classmethod
    def of(cls, config: Config, frames: int | None, segment: int | None) -> tuple[Config, Segments]:
        """Return the recipe with videos that hold whole segments, and these. stderr tells what is left over.

        Args:
            frames: latent frames of a video; None: as the recipe says.
            segment: latent frames of a segment; None: as many as the recipe's videos have, or all.

        Raises:
            UserError: a video is shorter than a segment, or a segment is a single picture.
        """
        video = config.video
        usual = sum(video.chunk_sizes)
        frames = usual if frames is None else frames
        segment = min(usual, frames) if segment is None else segment
        if segment < 2:
            raise UserError(f"a segment of {segment} latent frame is a single picture at a video's begin; give --segment 2 or more")
        if frames < segment:
            raise UserError(
                f"videos of {frames} latent frames are shorter than a segment of {segment}; give --frames {segment} or more, or a smaller "
                "--segment"
            )
        found = cls(segment, frames // segment)
        needed = found.count * segment
        chunks = math.ceil((needed - video.independent_first_frame) / video.chunk_frames)
        rest = f"; the last {frames - needed} of {frames} are no whole segment, and are not made" if frames > needed else ""
        print(f"{found.count} segments of {segment} latent frames{rest}", file=sys.stderr)
        return config.model_copy(update={"video": video.model_copy(update={"chunks": chunks})}), found

    def settings(self, vae: VAESizes) -> dict[str, Any]:
        """Return what scores depend on: the length of a segment, and the pixel frames of each."""
        ends = [pixels(vae, self.latent_frames * place) for place in range(self.count + 1)]
        return {"latent_frames": self.latent_frames, "frames": [end - begin for begin, end in pairwise(ends)]}


def pixels(vae: VAESizes, frame: int) -> int:
    """Return the pixel frames before a latent frame, counted from 0."""
    return max(0, vae.pixel_frames(frame))


def chunk_starts(shape: VideoShape) -> list[int]:
    """Return the first latent frame of every chunk."""
    return list(accumulate(shape.chunk_frames[:-1], initial=0))


@torch.no_grad()
def judge_segments(
    config: Config,
    generator: Generator,
    engine: Engine,
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    rewards: Mapping[str, Reward],
    segments: Segments,
) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
    """Make a batch of long videos, and judge each segment as soon as it is there, `rollout.decode_branches` videos at a time.

    Delete the frames before the next ones are asked for: their memory is needed.

    Args:
        prompts: one for each video; all of them change at the same frames.
        groups: which noise is whose.

    Yields:
        the rows of some videos, their frames [n, F, 3, H, W] of the segment, and scores and measures [n] fp32 on the CPU by name; every
        row comes once for each segment.
    """
    judging, starts = Judging.of(config, generator), chunk_starts(engine.shape)
    placed = [prompt.at_chunks(starts) for prompt in prompts]
    texts = {start: generator.encode_text([prompt[start].for_generator for prompt in placed]) for start in placed[0]}
    noise = StackedNoise([KeyedNoise(engine.shape, GroupId(config.evaluation.seed, group=group)) for group in groups])
    at_once, shortest = judging.at_once or len(prompts), config.video.chunk_frames
    rows = [slice(start, start + at_once) for start in range(0, len(prompts), at_once)]
    states = [judging.decoder.start() for _ in rows]
    first_pictures: dict[int, Tensor] = {}
    stream = engine.start(texts[0])
    try:
        chunks = engine.stream(stream, noise, switches={start: text for start, text in texts.items() if start})
        for number, latents in enumerate(_cut((chunk.predictions[-1] for chunk in chunks), segments.latent_frames)):
            span = range(number * segments.latent_frames, (number + 1) * segments.latent_frames)
            own = [parts(span, {start: prompt.text for start, prompt in by_start.items()}, shortest) for by_start in placed]
            for index, part in enumerate(rows):
                with profiling.stage("decode"), judging.at_work(judging.decoder.vae):
                    frames, states[index] = judging.decoder.decode(latents[part], states[index])
                scores = _judge_parts(judging, rewards, frames, own[part])
                picture = mean_pictures(frames)
                similar = similarity(picture, first_pictures.setdefault(index, picture))
                yield part, frames, scores | measures(frames) | {SIMILARITY: similar}
                del frames  # the next ones need the memory
    finally:
        stream.cache.release()


def _cut(chunks: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """Yield latents [B, length, C, h, w] of one segment after the other; what is left at the end is none."""
    waiting: list[Tensor] = []
    for chunk in chunks:
        waiting.append(chunk)
        while sum(part.shape[1] for part in waiting) >= length:
            latents = torch.cat(waiting, dim=1)
            waiting = [latents[:, length:].clone()]  # a view would keep the segment
            yield latents[:, :length]


def _judge_parts(judging: Judging, rewards: Mapping[str, Reward], frames: Tensor, own: Sequence[Sequence[Part]]) -> dict[str, Tensor]:
    """Return the scores of a segment, means over its parts, weighted by their latent frames.

    own: the parts of each video; those of all lie alike.
    """
    lengths = [part.frames for part in own[0]]
    segment = View(range(lengths[0].start, lengths[-1].stop), 0, ())
    total: dict[str, Tensor] = {}
    for place, latents in enumerate(lengths):
        seen = frames[:, segment.pixels(latents, judging.decoder.factor)].contiguous()
        ((_, scores),) = judging.judge(rewards, [seen], [of_video[place].prompt or "" for of_video in own])
        share = len(latents) / len(segment.frames)
        total = {name: share * values + total.get(name, 0.0) for name, values in scores.items()}
    return total


# What is measured beside the rewards -----------------------------------------------------------------------------------------------


def measures(frames: Tensor) -> dict[str, Tensor]:
    """Return measures [N] fp32 on the CPU of frames [N, F, 3, H, W] in [0, 1], means over frames; one frame at a time.

    luminance: the mean of all colors. clipped: the share of pixels of which a color is at the end of what 8 bits show. chroma: the standard
    deviation within a frame of the colors less the pixel's luminance. contrast: that of the luminance. acutance: see `sharpness`.
    motion: see `looks.motion_and_detail`.
    """
    names = (LUMINANCE, CLIPPED, CHROMA, CONTRAST, ACUTANCE)
    found = [torch.stack([_measured(frame) for frame in video.float()]).mean(0) for video in frames]
    return dict(zip(names, torch.stack(found).cpu().unbind(1))) | {MOTION: motion_and_detail(frames)[MOTION]}


def _measured(frame: Tensor) -> Tensor:
    """Return luminance, clipped, chroma, contrast and acutance [5] of a frame [3, H, W]."""
    luminance = frame.mean(0)
    clipped = ((frame <= 0.5 / 255) | (frame >= 254.5 / 255)).any(0).float().mean()
    chroma = (frame - luminance).var((1, 2), correction=0).mean().sqrt()
    return torch.stack([luminance.mean(), clipped, chroma, luminance.std(correction=0), acutance(frame)])


def mean_pictures(frames: Tensor) -> Tensor:
    """Return the mean over frames [N, F, 3, H, W] of each video, `SIDE` pixels high and wide, as rows [N, D] fp32 on the CPU."""
    return torch.stack([F.adaptive_avg_pool2d(video.float().mean(0), SIDE).flatten() for video in frames]).cpu()


def similarity(pictures: Tensor, first: Tensor) -> Tensor:
    """Return the correlation [N] of mean pictures [N, D] with those of the first segment: 1 for the same picture, 0 where nothing is left.

    It needs no model: layout and colors are compared, not what is shown. A moving camera, a new scene or another prompt lower it, too;
    a change of brightness or contrast alone does not.
    """
    pictures, first = (values.double() - values.double().mean(1, keepdim=True) for values in (pictures, first))
    return ((pictures * first).sum(1) / (pictures.norm(dim=1) * first.norm(dim=1)).clamp_min(1e-12)).float()
