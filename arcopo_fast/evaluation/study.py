"""A study of which noise decides: measured prompt by prompt and pivot by pivot, kept, and summed up (AR-CoPO, Figure 6)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from arcopo_fast.build import build_engine, load_generator, load_prompts
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.influence import mean_squared_change, noise_name, substitute
from arcopo_fast.evaluation.judging import Judging
from arcopo_fast.model.adapter_files import read_adapter
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.rollout.noise import GroupId, KeyedNoise
from arcopo_fast.runtime.console import Progress
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import describe, digest, require_same
from arcopo_fast.storage.video import write_png_sheet

MEASURES = {
    "chunk": "Latents of the pivot chunk",
    "video": "Latents of the whole video from the pivot on",
    "frames": "Decoded frames from the pivot on, in levels of 0 to 255",
}
"""The things whose mean squared change is measured, per element; frames in levels of 0 to 255."""
RATIO = "ratio"
FRAME_COLUMNS, FRAME_SIDE = 12, 128
"""The size of the figures: about so many frames in a row, one of each chunk at least, and pixels of a frame's shorter side."""

Record = dict[str, Any]
"""One prompt and pivot: {"prompt": i, "text": ..., "pivot": p, measure: {noise: [change by draw]}}; prompts count from 0, pivots from 1.
The first prompt's videos are shown; its records also have "times", the frames in a row, and "marked", the columns of the pivot chunk."""


def study_noise(config: Config, *, prompts: int, draws: int, adapter: Path | None, directory: Path) -> Study:
    """Measure what is missing of `prompts` prompts, the evaluation prompts first.

    Args:
        draws: independent replacements of every noise tensor.
        adapter: of the generator; None: without.
        directory: of the study; one that is there goes on.

    Raises:
        UserError: the input cannot be used, or the directory holds something else.
    """
    texts = [prompt.for_generator for part in reversed(load_prompts(config)) for prompt in part]
    if prompts > len(texts):
        raise UserError(f"--prompts is {prompts}, but {config.prompts} has {len(texts)}; give at most that")
    study = Study.open(directory, settings_of(config, texts, adapter, draws))
    missing = {index: pivots for index in range(prompts) if (pivots := study.missing(index, config.video.count))}
    if missing:
        generation = Generation(config, adapter, draws)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {directory}: {error.strerror}; give --out a directory that can be written") from None
        left = sum(map(len, missing.values()))
        with Progress(prompts * config.video.count, prompts * config.video.count - left) as progress:
            for index, pivots in missing.items():
                for record in generation.measure(index, texts[index], pivots, directory if index == 0 else None):
                    study.add(record)
                    progress.update(**{name: sum(values) / draws for name, values in record["video"].items()})
    return study


# Measuring -------------------------------------------------------------------------------------------------------------------------


class Generation:
    """The generator of the study, and what it changes under replaced noise."""

    def __init__(self, config: Config, adapter: Path | None, draws: int) -> None:
        self.config = config
        self.draws = draws
        self.generator = load_generator(config)
        if adapter:
            load_adapter(self.generator.model, adapter)
        most = 1 + draws * max(len(config.sampler.steps), len(config.sampler.first_chunk_steps or ()))
        self.branches = max(2, min(most, config.rollout.wave_size))
        # With a window the context holds frames that its branches no longer see: one video more.
        videos = self.branches + (config.cache.window is not None)
        self.engine = build_engine(config, self.generator.model, videos=videos, vae=self.generator.decoder.vae)
        self.shape = self.engine.shape
        self.pixel_frames = VAESizes.from_config(self.generator.decoder.vae.config).pixel_frames

    def measure(self, index: int, prompt: str, pivots: Sequence[int], figures: Path | None) -> Iterator[Record]:
        """Yield a record for each of `pivots`, counted from 1, of one prompt; with `figures` a sheet of frames goes to that directory."""
        text = self.generator.encode_text([prompt])
        noise, *others = (
            KeyedNoise(self.shape, GroupId(self.config.evaluation.seed, iteration=draw, group=index)) for draw in range(1 + self.draws)
        )
        batches = substitute(self.engine, text, noise, others, pivots=[pivot - 1 for pivot in pivots], branches=self.branches)
        for pivot, of_pivot in groupby(batches, key=lambda videos: videos.pivot):
            record: Record = {"prompt": index, "text": prompt, "pivot": pivot + 1}
            times, marked = self._columns(pivot)
            shown: list[Tensor] = []
            for videos in of_pivot:
                frames, sheet = self._decoded(videos.latents, pivot, times)
                changes = {"chunk": mean_squared_change(videos.latents[pivot]), "video": mean_squared_change(videos.tail), "frames": frames}
                for measure, values in changes.items():
                    for (_, step), value in zip(videos.replaced, values.tolist(), strict=True):
                        record.setdefault(measure, {}).setdefault(noise_name(step), []).append(value)
                first_draw = [row for row, (draw, _) in enumerate(videos.replaced, start=1) if draw == 0]
                shown += sheet[first_draw if shown else [0, *first_draw]]
            if figures:
                record |= {"times": times, "marked": marked}
                path = figure_path(figures, pivot + 1)
                write_png_sheet(path, torch.cat(shown), columns=len(times), smallest_side=FRAME_SIDE, marked=marked)
            yield record

    def _decoded(self, latents: list[Tensor], pivot: int, times: list[int]) -> tuple[Tensor, Tensor]:
        """Return the change of the frames from the pivot on, of each row but the first, [rows - 1]; and small frames at `times`."""
        first, base = self._start(pivot), None
        changes, sheet = [], []
        tails = torch.cat(latents[pivot:], dim=1)
        prefix = torch.cat(latents[:pivot], dim=1) if pivot else None
        for frames in Judging.of(self.config, self.generator).decode(tails, prefix):
            base = frames[:1, first:].clone() if base is None else base
            changes.append(mean_squared_change(255 * torch.cat([base, frames[:, first:]])))
            small = max(1, min(frames.shape[-2:]) // FRAME_SIDE)
            sheet.append(functional.avg_pool2d(frames[:, times].flatten(0, 1), small).unflatten(0, (len(frames), -1)).cpu())
            del frames  # the next ones need the memory
        return torch.cat(changes)[1:], torch.cat(sheet)

    def _start(self, chunk: int) -> int:
        """Return the first pixel frame of a chunk; of the chunk after the last, the number of frames."""
        latents = sum(self.shape.chunk_frames[:chunk])
        return self.pixel_frames(latents) if latents else 0

    def _columns(self, pivot: int) -> tuple[list[int], list[int]]:
        """Return which frames a figure shows, spread over each chunk, and which of its columns are the pivot chunk's."""
        each = max(1, FRAME_COLUMNS // self.shape.chunks)
        times: list[int] = []
        marked: list[int] = []
        for chunk in range(self.shape.chunks):
            first, after = self._start(chunk), self._start(chunk + 1)
            own = sorted({first + (2 * part + 1) * (after - first) // (2 * each) for part in range(each)})
            marked += range(len(times), len(times) + len(own)) if chunk == pivot else ()
            times += own
        return times, marked


def figure_path(directory: Path, pivot: int) -> Path:
    """Return the sheet of frames of a pivot."""
    return directory / f"pivot-{pivot}.png"


# Keeping ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """The records so far, in `directory`/entropy.json. settings: all that numbers depend on, by dotted key."""

    directory: Path
    settings: dict[str, Any]
    records: list[Record]

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any]) -> Study:
        """Begin a study, or go on with that of the directory; writes nothing.

        Raises:
            UserError: the directory holds a study with other settings, or something that is none.
        """
        path = directory / "entropy.json"
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {directory} is a file; give a directory")
        if not path.exists():
            return cls(directory, settings, [])
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            former, records = dict(document["settings"]), list(document["records"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read as a study ({error!r}); remove it, or give another --out") from None
        require_same(f"{directory} holds a study with other settings", former, settings, "give another --out, or remove the directory")
        return cls(directory, settings, records)

    def missing(self, prompt: int, pivots: int) -> list[int]:
        """Return the pivots of a prompt that are not measured yet."""
        known = {record["pivot"] for record in self.records if record["prompt"] == prompt}
        return [pivot for pivot in range(1, pivots + 1) if pivot not in known]

    def add(self, record: Record) -> None:
        """Add a record, and write the study."""
        self.records.append(record)
        self.records.sort(key=lambda entry: (entry["prompt"], entry["pivot"]))
        document = {"settings": self.settings, "summary": summarize(self.records), "records": self.records}
        atomic_write(self.directory / "entropy.json", json.dumps(document, indent=1, allow_nan=False) + "\n")


def settings_of(config: Config, prompts: Sequence[str], adapter: Path | None, draws: int) -> dict[str, Any]:
    """Return what a study's numbers depend on; how fast and where they are computed is left out.

    Raises:
        UserError: the adapter cannot be read.
    """
    sections: dict[str, Any] = {
        "generator": {"checkpoint", "dtype", "vae_dtype"},
        "video": True,
        "sampler": True,
        "cache": True,
        "evaluation": {"seed"},
    }
    kept = config.model_dump(mode="json", include={"seed": True, **sections}, exclude={"video": {"fps", "decode_frames"}})
    adapted = "none"
    if adapter:
        given = read_adapter(adapter)
        tensors = {name: tensor.contiguous() for name, tensor in given.state.items()}
        adapted = digest(safetensors.torch.save(tensors, {"alpha": f"{given.alpha:g}"}))[:12]
    text = digest("\n".join(prompts))[:12]
    return describe({**kept, "prompts": f"{config.prompts} ({text})", "adapter": adapted, "draws": draws})


# Statistics ------------------------------------------------------------------------------------------------------------------------


def summarize(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return, for each pivot and measure, every noise's mean change and `RATIO`, the initial noise's over the largest re-noise's.

    Errors are standard errors over prompts, by the jackknife: the draws of one prompt share its video and are averaged first. With a single
    prompt they are over its draws. None: not known, or there is no re-noise.
    """
    summary = []
    for pivot, group in groupby(sorted(records, key=lambda record: record["pivot"]), key=lambda record: record["pivot"]):
        of_pivot = list(group)
        entry: dict[str, Any] = {"pivot": pivot, "prompts": len(of_pivot)}
        for measure in MEASURES:
            names = list(of_pivot[0][measure])
            changes = np.array([[record[measure][name] for name in names] for record in of_pivot])  # [prompts, noises, draws]
            units = changes.mean(axis=2) if len(of_pivot) > 1 else changes[0].T
            entry[measure] = {name: _estimate(units[:, index], float) for index, name in enumerate(names)}
            entry[measure][RATIO] = _estimate(units, _ratio)
        summary.append(entry)
    return summary


def _ratio(mean: NDArray[np.float64]) -> float:
    largest = mean[1:].max(initial=0.0)
    return float(mean[0] / largest) if largest > 0 else math.nan


def _estimate(units: NDArray[np.float64], statistic: Callable[[Any], float]) -> dict[str, float | None]:
    """Return a statistic of the mean over units [n, ...] and its standard error, by leaving out one after the other."""
    count, total = len(units), units.sum(axis=0)
    error = math.nan
    if count > 1:
        without = np.array([statistic((total - unit) / (count - 1)) for unit in units])
        error = math.sqrt((count - 1) * float(without.var()))
    values = {"mean": statistic(total / count), "error": error}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
