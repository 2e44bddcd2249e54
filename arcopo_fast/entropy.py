"""Which noise decides: replace one noise tensor of a chunk, freeze every other draw, and measure the change (AR-CoPO, Figure 6).

    python -m arcopo_fast.entropy [RECIPE] [key=value ...] [--prompts N] [--draws N] [--adapter DIR] [--out DIR]

For every pivot chunk the initial noise and each re-noise are replaced in turn. In few-step autoregressive generators the initial noise
decides; where it does not, AR-CoPO has nothing to explore with. The results lie in one directory:

    entropy.json  entropy.md  entropy.html  entropy.png  pivot-1.png ... pivot-L.png

entropy.json is written anew after each pivot of each prompt: an interrupted study goes on from there, and one that is done can be given
more prompts.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
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
from arcopo_fast.cli import RecipeParser, adapter_path, positive_int, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.influence import mean_squared_change, noise_name, substitute
from arcopo_fast.evaluation.judging import Judging
from arcopo_fast.model.adapter_files import read_adapter
from arcopo_fast.model.lora import load_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.reports.html import page, section, table
from arcopo_fast.reports.table import markdown_table
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.runtime.console import Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import describe, digest, require_same
from arcopo_fast.storage.video import stack_png, write_png_sheet

MEASURES = {
    "chunk": "Latents of the pivot chunk",
    "video": "Latents of the whole video from the pivot on",
    "frames": "Decoded frames from the pivot on, in levels of 0 to 255",
}
"""Of what the mean squared change is taken, per element; frames in levels of 0 to 255."""
RATIO = "ratio"
FRAME_COLUMNS, FRAME_SIDE = 12, 128
"""Of the figures: about so many frames in a row, one of each chunk at least, and pixels of a frame's shorter side."""

Record = dict[str, Any]
"""Of one prompt and pivot: {"prompt": i, "text": ..., "pivot": p, measure: {noise: [change by draw]}}; prompts count from 0, pivots from 1.
The first prompt's videos are shown; its records also have "times", the frames in a row, and "marked", the columns of the pivot chunk."""


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
        """A record for each of `pivots`, counted from 1, of one prompt; with `figures` a sheet of frames goes to that directory."""
        text = self.generator.encode_text([prompt])
        noise, *others = (
            KeyedNoise(self.shape.chunk, self.config.evaluation.seed, iteration=draw, group=index) for draw in range(1 + self.draws)
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
        """The change of the frames from the pivot on, of each row but the first, [rows - 1]; every row's frames at `times`, made small."""
        first, base = self._start(pivot), None
        changes, sheet = [], []
        for frames in Judging.of(self.config, self.generator).decode(latents, pivot):
            base = frames[:1, first:].clone() if base is None else base
            changes.append(mean_squared_change(255 * torch.cat([base, frames[:, first:]])))
            small = max(1, min(frames.shape[-2:]) // FRAME_SIDE)
            sheet.append(functional.avg_pool2d(frames[:, times].flatten(0, 1), small).unflatten(0, (len(frames), -1)).cpu())
            del frames  # the next ones need the memory
        return torch.cat(changes)[1:], torch.cat(sheet)

    def _start(self, chunk: int) -> int:
        """The first pixel frame of a chunk; of the chunk after the last, the number of frames."""
        latents = sum(self.shape.chunk_frames[:chunk])
        return self.pixel_frames(latents) if latents else 0

    def _columns(self, pivot: int) -> tuple[list[int], list[int]]:
        """Which frames a figure shows, spread over each chunk, and which of its columns are the pivot chunk's."""
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
    return directory / f"pivot-{pivot}.png"


# Keeping ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """What is known so far, in `directory`/entropy.json. settings: all that numbers depend on, by dotted key."""

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
        """Pivots of a prompt that are not measured yet."""
        there = {record["pivot"] for record in self.records if record["prompt"] == prompt}
        return [pivot for pivot in range(1, pivots + 1) if pivot not in there]

    def add(self, record: Record) -> None:
        self.records.append(record)
        self.records.sort(key=lambda one: (one["prompt"], one["pivot"]))
        document = {"settings": self.settings, "summary": summarise(self.records), "records": self.records}
        atomic_write(self.directory / "entropy.json", json.dumps(document, indent=1, allow_nan=False) + "\n")


def settings_of(config: Config, prompts: Sequence[str], adapter: Path | None, draws: int) -> dict[str, Any]:
    """What a study's numbers depend on; how fast and where they are computed is left out.

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


def summarise(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each pivot and measure: every noise's mean change and `RATIO`, the initial noise's over the largest re-noise's, with errors.

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
    """A statistic of the mean over units [n, ...] and its standard error, by leaving out one after the other."""
    count, total = len(units), units.sum(axis=0)
    error = math.nan
    if count > 1:
        without = np.array([statistic((total - unit) / (count - 1)) for unit in units])
        error = math.sqrt((count - 1) * float(without.var()))
    values = {"mean": statistic(total / count), "error": error}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


# Showing ---------------------------------------------------------------------------------------------------------------------------


def noises(summary: Sequence[dict[str, Any]]) -> list[str]:
    """All noises of a study, "initial" first; the first chunk may have other steps than the rest."""
    names = [name for entry in summary for name in entry["video"] if name != RATIO]
    return sorted(dict.fromkeys(names), key=lambda name: (name != "initial", len(name), name))


def spoken(name: str) -> str:
    return "initial noise" if name == "initial" else name.replace("renoise", "re-noise ")


def number(value: dict[str, float | None] | None) -> str:
    """To two digits of its error, or to three where that is not known; a dash for what there is none of."""
    mean, error = (value["mean"], value["error"]) if value else (None, None)
    if mean is None:
        return "–"
    if not error:
        return f"{mean:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _about(study: Study, summary: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What was done, and what has to be said about re-noises where there are none."""
    counts = sorted({entry["prompts"] for entry in summary})
    prompts = f"{counts[0]} prompt{'s' * (counts[0] > 1)}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} prompts"
    draws = study.settings["draws"]
    errors = "prompts" if counts[-1] > 1 else "draws"
    spread = f", ± one standard error over {errors}" if counts[-1] > 1 or draws > 1 else ""
    done = f"Mean squared change per element when one noise tensor is replaced; {prompts}, {draws} draw{'s' * (draws > 1)} each{spread}."
    missing = ""
    if noises(summary) == ["initial"]:
        kind, steps = study.settings["sampler.kind"], len(study.settings["sampler.steps"])
        why = "of a single step" if steps == 1 else f"of kind {kind}, which is deterministic after the first draw"
        missing = f"There is no re-noise to compare with: the sampler is {why}."
    return done, missing


def markdown(study: Study, summary: Sequence[dict[str, Any]]) -> str:
    """entropy.md: a table for each measure, a line for each pivot."""
    names = noises(summary)
    parts = ["# Which noise decides", *filter(None, _about(study, summary))]
    for measure, title in MEASURES.items():
        rows = [[str(entry["pivot"]), *(number(entry[measure].get(name)) for name in [*names, RATIO])] for entry in summary]
        parts += [f"## {title}", markdown_table(["pivot", *map(spoken, names), RATIO], rows).rstrip()]
    return "\n\n".join([*parts, "Ratio: the initial noise's change over that of the largest re-noise."]) + "\n"


def html(study: Study, summary: Sequence[dict[str, Any]], name: str) -> str:
    """entropy.html: the ratio, a bar for each change, all numbers, and the frames of the first prompt for each pivot."""
    done, missing = _about(study, summary)
    ratios = [entry["video"][RATIO]["mean"] for entry in summary if entry["video"][RATIO]["mean"] is not None]
    result = ""
    if ratios:
        low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (min(ratios), max(ratios)))
        result = (
            f'<p class="result"><span class="number">{low if low == high else f"{low} to {high}"} ×</span> '
            "as much changes, by pivot, with the chunk's initial noise as with its most important re-noise</p>"
        )
    steps = ", ".join(f"{step:g}" for step in study.settings["sampler.steps"])
    facts = f"generator {study.settings['generator.checkpoint']} · adapter {study.settings['adapter']} · steps {steps}"
    numbers = "".join(f"<h3>{title}</h3>{_number_table(summary, measure)}" for measure, title in MEASURES.items())
    return page(
        f"Which noise decides - {name}",
        [
            f"<style>{_STYLE}</style><header><h1>Which noise decides: {escape(name)}</h1>{result}"
            f'<p class="facts">{escape(facts)}<br>{escape(done)} {escape(missing)}</p></header>',
            section("Change by what is replaced", _bars(summary), f"{MEASURES['video']}. All bars have one scale."),
            section("Frames", "".join(_figures(study)), _FRAMES_NOTE),
            section("All numbers", numbers, "Ratio: the initial noise's change over that of the largest re-noise."),
        ],
    )


_FRAMES_NOTE = (
    "One prompt, the first draw. The top row is the unchanged video; each row below has one noise tensor of the pivot chunk replaced, "
    "everything else is frozen. The bar lies above the frames of the pivot chunk."
)
_STYLE = """
h3 { margin: 26px 0 0; font-size: 16px; }
th:first-child { white-space: nowrap; }
.bars td.bar { width: 50%; min-width: 60px; }
.frames { margin: 20px 0 34px; }
.frames > div { display: grid; grid-template-columns: 92px minmax(0, 1fr); gap: 0 10px; }
.frames .names { display: grid; grid-auto-rows: 1fr; align-items: center; padding-top: 28px; font-size: 13px; }
.frames .scroll { overflow-x: auto; scrollbar-width: thin; }
.frames .times { display: grid; height: 24px; font-size: 12px; color: var(--quiet); text-align: center; }
.frames .times b { color: var(--ink); }
.frames img { display: block; width: 100%; image-rendering: pixelated; }
@media (max-width: 520px) { .frames > div { grid-template-columns: 72px minmax(0, 1fr); } .frames .names { font-size: 12px; } }
"""


def _bars(summary: Sequence[dict[str, Any]]) -> str:
    measured = [(entry, name, entry["video"][name]) for entry in summary for name in entry["video"] if name != RATIO]
    most = max(value["mean"] for *_, value in measured) or 1.0
    rows, pivot = [], None
    for entry, name, value in measured:
        if entry["pivot"] != pivot:
            pivot = entry["pivot"]
            ratio = entry["video"][RATIO]
            heading = f"Pivot {pivot}" + (f", ratio {number(ratio)}" if ratio["mean"] is not None else "")
            rows.append(f'<tr class="group"><th colspan="3" scope="rowgroup">{heading}</th></tr>')
        width = 100 * value["mean"] / most
        rows.append(
            f'<tr><th scope="row">{spoken(name)}</th><td>{number(value)}</td><td class="bar"><i style="width:{width:.2f}%"></i></td></tr>'
        )
    return f'<div class="bars">{table(["", "change", ""], rows)}</div>'


def _number_table(summary: Sequence[dict[str, Any]], measure: str) -> str:
    names = [*noises(summary), RATIO]
    rows = []
    for entry in summary:
        cells = "".join(f"<td>{number(entry[measure].get(name))}</td>" for name in names)
        rows.append(f'<tr><th scope="row">{entry["pivot"]}</th>{cells}</tr>')
    return table(["pivot", *map(spoken, names)], rows)


def _figures(study: Study) -> Iterator[str]:
    """For each pivot the sheet of frames with its rows and columns named; rows are as high as the sheet's, whatever the width."""
    for record in study.records:
        path = figure_path(study.directory, record["pivot"])
        if "times" not in record or not path.is_file():
            continue
        labels = ["unchanged", *(spoken(name) for name in record["video"])]
        tags = ["b" if column in record["marked"] else "span" for column in range(len(record["times"]))]
        times = "".join(f"<{tag}>{time}</{tag}>" for tag, time in zip(tags, record["times"]))
        width = f"min-width:{58 * len(tags)}px"
        yield (
            f'<figure class="frames"><figcaption><b>Pivot {record["pivot"]}</b> {escape(record["text"])}</figcaption><div>'
            f'<div class="names">{"".join(f"<span>{label}</span>" for label in labels)}</div><div class="scroll">'
            f'<div class="times" style="{width};grid-template-columns:repeat({len(tags)},1fr)">{times}</div>'
            f'<img style="{width}" alt="Frames of pivot {record["pivot"]}: {", ".join(labels)}" '
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></div></div></figure>'
        )


def write_results(study: Study, name: str) -> str:
    """entropy.md, entropy.html and entropy.png from what is known; returns the Markdown."""
    summary = summarise(study.records)
    text = markdown(study, summary)
    atomic_write(study.directory / "entropy.md", text)
    pictures = [path for entry in summary if (path := figure_path(study.directory, entry["pivot"])).is_file()]
    if pictures:
        stack_png(study.directory / "entropy.png", pictures)
    atomic_write(study.directory / "entropy.html", html(study, summary, name))
    return text


# The command -----------------------------------------------------------------------------------------------------------------------


def entropy(config: Config, *, prompts: int, draws: int, adapter: Path | None, directory: Path) -> Study:
    """Measure what is missing of `prompts` prompts, the evaluation prompts first, and write the results."""
    every = [prompt.for_generator for part in reversed(load_prompts(config)) for prompt in part]
    if prompts > len(every):
        raise UserError(f"--prompts is {prompts}, but {config.prompts} has {len(every)}; give at most that")
    study = Study.open(directory, settings_of(config, every, adapter, draws))
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
                for record in generation.measure(index, every[index], pivots, directory if index == 0 else None):
                    study.add(record)
                    progress.update(**{name: sum(values) / draws for name, values in record["video"].items()})
    print(write_results(study, config.name))
    print(f"figure: {directory / 'entropy.html'}")
    return study


def command_line() -> RecipeParser:
    parser = RecipeParser("python -m arcopo_fast.entropy", "Which noise decides what a generator shows (AR-CoPO, Figure 6).")
    parser.add_argument(
        "--prompts", type=positive_int, metavar="N", default=8, help="prompts to measure, those for evaluation first; what DIR holds counts"
    )
    parser.add_argument("--draws", type=positive_int, metavar="N", default=2, help="independent replacements of every noise tensor")
    parser.add_argument("--adapter", type=adapter_path, metavar="DIR", help="study the generator with this adapter (default: without)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the results go; a study that is there goes on (default: entropy/<the recipe's name>)"
    )
    return parser


def main(argv: list[str]) -> None:
    command = command_line().read_config(argv)
    if command is None:
        return
    config, options = command
    tune_for_cpu()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    directory = options.out or Path("entropy") / config.name
    entropy(config, prompts=options.prompts, draws=options.draws, adapter=options.adapter, directory=directory)


if __name__ == "__main__":
    sys.exit(run_command(main))
