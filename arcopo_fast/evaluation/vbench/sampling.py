"""VBench's videos: what makes them what they are, and making those that are missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from arcopo_fast.build import Generator, encode_ahead, sized_engine
from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.vbench.data import Video
from arcopo_fast.evaluation.videos import stream_frames
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, StackedNoise
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.distributed import ALONE, World
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import digest, file_digest, require_same, weights_digest
from arcopo_fast.storage.video import Mp4Writer


def sampling_of(config: Config, generator: Generator, prompts: str) -> dict[str, Any]:
    """Return what the videos depend on. prompts: the manifest. The adapter, if any, is loaded."""
    return {
        "weights": weights_digest(generator.model.state_dict()),
        "vae_weights": weights_digest(generator.decoder.vae.state_dict()),
        "text_encoder": generator.encode_text.fingerprint,
        "manifest": digest(prompts),
        "video": config.video.model_dump(exclude={"decode_frames"}),
        "sampler": config.sampler.model_dump(),
        "cache": config.cache.model_dump(),
        "dtype": config.generator.dtype,
        "vae_dtype": config.generator.vae_dtype,
    }


def begin(out: Path, prompts: str, sampling: Mapping[str, Any], sources: Mapping[str, Any]) -> Path:
    """Return the directory for the videos, with the manifest and what they are made with beside it.

    sources: where all that came from, to be read by people.

    Raises:
        UserError: there are videos of something else.
    """
    record = out / "sampling.json"
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))["sampling"]
        require_same(f"{out} has videos of something else (see {record})", earlier, sampling, "give another --out")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    atomic_write(out / "manifest.jsonl", prompts)
    atomic_write(record, json.dumps({"sampling": sampling, "sources": sources}, indent=2) + "\n")
    return out / "videos"


def make_videos(
    config: Config, generator: Generator, videos: Sequence[Video], directory: Path, *, batch: int, world: World = ALONE
) -> None:
    """Make those videos that are not in the directory yet. A video's noise depends on its seed alone.

    batch: videos that are made at once.
    world: the ranks that share the batches.

    Raises:
        Interrupted: the user asked to stop; the videos at hand were finished.
    """

    def made() -> int:
        return len({video.file for video in videos} & set(os.listdir(directory)))

    missing = world.from_main([video for video in videos if not (directory / video.file).exists()])  # before anybody makes one
    encode_ahead(generator.encode_text, [video.text for video in missing], world)
    batch = min(batch, len(missing))
    if not (starts := range(0, len(missing), max(batch, 1))[world.rank :: world.size]):
        return
    engine = sized_engine(config, generator, batch, longer=False)
    with Interruption("the videos at hand") as interruption, Progress(len(videos), made(), ranks=world.size) as progress:
        for start in starts:
            if interruption.asked:
                raise Interrupted(f"{made()} of {len(videos)} videos are made; the same command makes the others")
            progress.skip(made() - progress.done)
            part = missing[start : start + batch]
            text = generator.encode_text([video.text for video in part])
            noise = StackedNoise([KeyedNoise(engine.shape, GroupId(video.seed)) for video in part])
            with ExitStack() as stack:
                writers = [stack.enter_context(Mp4Writer(directory / video.file, config.video.fps, smallest_side=1)) for video in part]
                for chunk in stream_frames(generator, engine, text, noise, offload=config.generator.offload):
                    for writer, frames in zip(writers, chunk):
                        writer.append(frames)
            for _ in part:
                progress.update()


def source_of(path: Path) -> dict[str, str]:
    """Return where a file lies and what is in it, to be read by people."""
    return {"path": str(path), "sha256": file_digest(path)}
