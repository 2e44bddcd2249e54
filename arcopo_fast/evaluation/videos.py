"""Videos, written to mp4 chunk by chunk while they are made: of any length, and with prompts that change on the way."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from arcopo_fast.build import Generator, encode_ahead, sized_engine
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoiseSource, StackedNoise
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.distributed import ALONE, World
from arcopo_fast.runtime.memory import resident
from arcopo_fast.runtime.rank_console import log_to
from arcopo_fast.storage.video import NOT_FINITE, Mp4Writer


class Switch(NamedTuple):
    """A change of prompt: from `frame` on, or the first chunk that begins after it, the video follows another one."""

    frame: int
    prompt: str


@torch.no_grad()
def stream_frames(
    generator: Generator,
    engine: Engine,
    text: Tensor,
    noise: NoiseSource,
    *,
    switches: Mapping[int, Tensor] | None = None,
    offload: bool = False,
) -> Iterator[Tensor]:
    """Yield each chunk's frames [B, F, 3, H, W] in [0, 1] as soon as they are there.

    Args:
        text: [B, length, text_dim], a row for each video.
        switches: {latent frame: text [1 or B, length, text_dim]}, as `Engine.stream` takes them.
        offload: the decoder is on the device only while it decodes.

    Raises:
        UserError: the generator's latents are not finite.
    """
    decoder, cache = generator.decoder, generator.decoder.start()
    stream = engine.start(text)
    try:
        for trajectory in engine.stream(stream, noise, switches=dict(switches or {})):
            latents = trajectory.predictions[-1]
            if odd := (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
                frame = VAESizes.from_config(decoder.vae.config).pixel_frames(cache.frames) if cache.frames else 0
                raise UserError(f"video {odd[0] + 1} of {len(latents)}: its latents are not finite from frame {frame} on; {NOT_FINITE}")
            with resident(engine.model.device, decoder.vae, offload=offload):
                frames, cache = decoder.decode(latents, cache)
            yield frames
    finally:
        stream.cache.release()


def generate(
    config: Config,
    generator: Generator,
    videos: Mapping[Path, str],
    *,
    seed: int,
    frames: int | None = None,
    switches: Sequence[Switch] = (),
    batch: int = 1,
    world: World = ALONE,
) -> None:
    """Write a video of each prompt to its file. Their sizes and times go to stderr.

    Args:
        videos: a prompt for each file.
        seed: of the noise.
        frames: of each video, rounded up to whole chunks; None: as the recipe says.
        switches: of every video.
        batch: videos that are made at once.
        world: the ranks that share the batches.

    Raises:
        UserError: the input cannot be used; no video was begun.
        Interrupted: the user asked to stop; what was made of the videos at hand is kept.
    """
    files, prompts = list(videos), list(videos.values())
    vae = VAESizes.from_config(generator.decoder.vae.config)
    usual = config.video.chunks
    if frames is not None:
        config = with_frames(config, frames, vae)
    shape, batch = VideoShape.of(config.video, generator.model.config.in_channels), min(batch, len(prompts))
    total = vae.pixel_frames(shape.frames)
    if frames not in (None, total):
        print(f"{frames} frames are not whole chunks of {config.video.chunk_frames} latent frames: making {total}", file=sys.stderr)
    placed = place_switches(switches, shape, vae)
    encode_ahead(generator.encode_text, [*prompts, *placed.values()], world)
    latent_switches = {frame: generator.encode_text([prompt]) for frame, prompt in placed.items()}
    for prompt in prompts:
        generator.encode_text([prompt])  # what it cannot read is said before a video is begun
    engine = sized_engine(config, generator, batch, longer=config.video.chunks > usual)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    log_to(files[0].parent)
    parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)[world.rank :: world.size]]
    with Interruption("the chunk") as interruption:
        for number, part in enumerate(parts):
            if interruption.asked:
                by = "" if world.alone else f" by rank {world.rank}"
                raise Interrupted(f"{number * batch} of {sum(len(prompts[part]) for part in parts)} videos are made{by}")
            noise = StackedNoise([KeyedNoise(shape, GroupId(seed, group=index)) for index in range(len(prompts))[part]])
            text = generator.encode_text(prompts[part])
            stream = stream_frames(generator, engine, text, noise, switches=latent_switches, offload=config.generator.offload)
            write_videos(stream, files[part], interruption, chunks=shape.chunks, frames=total, fps=config.video.fps)


def write_videos(
    videos: Iterator[Tensor], files: Sequence[Path], interruption: Interruption, *, chunks: int, frames: int, fps: float
) -> None:
    """Write a batch of videos chunk by chunk, and say how fast they came.

    Args:
        videos: yields [B, F, 3, H, W], `chunks` times; B videos of `frames` frames each.
        files: one for each video.

    Raises:
        Interrupted: the user asked to stop before the last chunk.
    """
    began = time.perf_counter()
    first, done = 0.0, 0
    with ExitStack() as stack, Progress(chunks) as progress:
        writers = [stack.enter_context(Mp4Writer(file, fps)) for file in files]
        for chunk in videos:
            for writer, part in zip(writers, chunk):
                writer.append(part)
            seconds, done = time.perf_counter() - began, writers[0].frames
            first = first or seconds
            progress.update(**{"frames/s": len(files) * done / seconds})
            if interruption.asked and done < frames:
                holders = f"{writers[0].partial} and {len(files) - 1} more hold" if len(files) > 1 else f"{writers[0].partial} holds"
                raise Interrupted(f"{holders} the first {done} of {frames} frames")
    pace = f"{len(files) * frames / (time.perf_counter() - began):.1f} frames/s"
    together = f" of {len(files)} videos at once" if len(files) > 1 else ""
    for file in files:
        line = f"{file.name}: {frames} frames, {frames / fps:.1f} s; first frame after {first:.2f} s, {pace}{together}"
        print(line, file=sys.stderr)


# What a video is made with ---------------------------------------------------------------------------------------------------------


def with_frames(config: Config, frames: int, vae: VAESizes) -> Config:
    """Return the recipe with as many chunks as hold `frames` frames."""
    video = config.video
    latents = 1 + math.ceil((frames - 1) / (vae.pixel_frames(2) - 1))
    chunks = max(1, math.ceil((latents - video.independent_first_frame) / video.chunk_frames))
    return config.model_copy(update={"video": video.model_copy(update={"chunks": chunks})})


def first_frames(shape: VideoShape, vae: VAESizes) -> dict[int, int]:
    """Return the number of each chunk's first frame, by that of its first latent frame; both count from 0."""
    starts = accumulate(shape.chunk_frames[:-1], initial=0)
    return {start: max(0, vae.pixel_frames(start)) for start in starts}


def place_switches(switches: Sequence[Switch], shape: VideoShape, vae: VAESizes) -> dict[int, str]:
    """Return the prompts to switch to, by the latent frame with which a chunk begins. Says where that is not the frame that was asked for.

    Raises:
        UserError: no chunk begins at or after a switch, or two of them fall on one chunk.
    """
    starts = first_frames(shape, vae)
    placed: dict[int, str] = {}
    for frame, prompt in sorted(switches):
        found = next((latent for latent, first in starts.items() if first >= frame), None)
        if found is None:
            raise UserError(f"--switch {frame}: the video's last chunk begins at frame {max(starts.values())}; give more --frames")
        if found in placed:
            raise UserError(f"--switch {frame}: another one falls on the same chunk, which begins at frame {starts[found]}; leave one out")
        if starts[found] != frame:
            print(f"the prompt changes at frame {starts[found]}, where a chunk begins, not at {frame}", file=sys.stderr)
        placed[found] = prompt
    return placed


def output_files(out: Path, prompts: Sequence[str]) -> list[Path]:
    """Return `out` itself if it names an mp4, for a single prompt; else one file for each in that directory: its number and words.

    Raises:
        UserError: several videos for one file, or a file of another kind.
    """
    if out.suffix.lower() in (".mov", ".avi", ".mkv", ".webm", ".gif", ".m4v", ".png", ".jpg"):
        raise UserError(f"--out {out}: videos are written as .mp4; give such a name, or a directory")
    if out.suffix.lower() == ".mp4":
        if len(prompts) > 1:
            raise UserError(f"--out {out} is one file, and there are {len(prompts)} prompts; give a directory")
        return [out]
    digits = max(2, len(str(len(prompts) - 1)))
    words = (re.sub(r"\W+", "-", prompt.lower())[:48].strip("-") for prompt in prompts)
    return [out / f"{index:0{digits}d}-{slug}.mp4" for index, slug in enumerate(words)]
