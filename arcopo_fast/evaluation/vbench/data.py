"""VBench as data: its dimensions, its prompts, the videos they ask for, and the total that its results give.

Sources: Vchitect/VBench, scripts/constant.py and scripts/cal_final_score.py (bounds, weights, total), vbench/__init__.py (names of videos),
prompts/README.md (seeds). The prompts are in VBench_full_info.json, which belongs to its authors and is read, never shipped.
Knows nothing of how videos are made, nor of how they are scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from arcopo_fast.errors import UserError
from arcopo_fast.storage.textfiles import read_text

INFO = "github://Vchitect/VBench/vbench/VBench_full_info.json"
RESULTS = "_eval_results.json"
"""Ends the name of a file of results, {dimension: [score, scores of single videos]}."""

VIDEOS_PER_PROMPT = 5
"""VBench looks at -0.mp4 to -4.mp4, and at no more."""
FLICKERING = "temporal_flickering"
FLICKERING_VIDEOS = 25
"""Videos of each of its prompts: only static videos count, and the first five of them are kept."""

_NAME_MAX = 255 - len(".partial")  # bytes of a file's name, and what it has more until it is complete


class Dimension(NamedTuple):
    """A raw score of `low` counts as 0, of `high` as 1; nothing is clipped."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    FLICKERING: Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(weight=0.5),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
DIMENSIONS = QUALITY | SEMANTIC


# Prompts and videos ----------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """An entry of VBench_full_info.json."""

    text: str
    dimensions: tuple[str, ...]


def read_info(path: Path) -> list[Prompt]:
    """The entries of VBench_full_info.json, in its order. A prompt may stand there twice, for different dimensions.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        info = [Prompt(entry["prompt_en"], tuple(entry["dimension"])) for entry in entries]
        if not info:
            raise ValueError("no prompts")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read prompts from {path}: {_reason(error)}; expected VBench's VBench_full_info.json") from None
    if strange := {name for prompt in info for name in prompt.dimensions} - DIMENSIONS.keys():
        raise UserError(f"{path} has an unknown dimension {sorted(strange)[0]!r}; expected VBench's VBench_full_info.json, of version 1")
    return info


def unique_prompts(info: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt once, with all of its dimensions, in the order of its first entry."""
    found: dict[str, dict[str, None]] = {}
    for prompt in info:
        found.setdefault(prompt.text, {}).update(dict.fromkeys(prompt.dimensions))
    return [Prompt(text, tuple(dimensions)) for text, dimensions in found.items()]


def read_extended(path: Path, info: Sequence[Prompt], originals: Path | None = None) -> dict[str, str]:
    """Return what is generated in place of each prompt, by the prompt. Of two lines for one prompt the first counts.

    Args:
        path: one extended prompt on each line.
        originals: the prompts, line by line; None: in the order of the info file's entries, as VBench's own sets have them.

    Raises:
        UserError: the lines do not match, a prompt has none, or an extended prompt is empty.
    """
    extended = _lines(path)
    prompts = _lines(originals) if originals else [prompt.text.strip() for prompt in info]
    if len(extended) != len(prompts):
        raise UserError(
            f"{path} has {len(extended)} lines, {originals or 'the info file'} {len(prompts)}: they are matched line by line; name the "
            "list of prompts that it extends with --originals"
        )
    if "" in extended:
        line = extended.index("")
        raise UserError(f"line {line + 1} of {path} is empty; expected an extended prompt for {prompts[line]!r}")
    by_prompt = dict(zip(reversed(prompts), reversed(extended)))
    if missing := [prompt.text for prompt in info if prompt.text.strip() not in by_prompt]:
        raise UserError(f"{originals} lacks {len(missing)} of VBench's prompts: {missing[0]!r}; give the list that {path} extends")
    return {prompt.text: by_prompt[prompt.text.strip()] for prompt in info}


def video_name(prompt: str, index: int) -> str:
    """VBench finds a video by exactly this name, with the original prompt, whatever it was generated from."""
    return f"{prompt}-{index}.mp4"


def video_seed(seed: int, prompt: str, index: int) -> int:
    """A video's seed, below 2^32. VBench fixes none: it wants them random, not picked, and recorded."""
    return int.from_bytes(hashlib.blake2b(repr((seed, prompt, index)).encode(), digest_size=4).digest(), "little")


class Video(NamedTuple):
    """text: what it is generated from."""

    file: str
    text: str
    seed: int


def manifest(info: Sequence[Prompt], extended: Mapping[str, str] | None, seed: int, per_prompt: int = VIDEOS_PER_PROMPT) -> str:
    """JSON lines, one for each prompt: its dimensions, its extended form or null, and file and seed of its videos.

    A prompt of temporal flickering has five times `per_prompt` videos, 25 of the usual 5.

    Raises:
        UserError: a prompt cannot be part of a file's name.
    """
    lines = []
    for prompt, dimensions in unique_prompts(info):
        count = per_prompt * FLICKERING_VIDEOS // VIDEOS_PER_PROMPT if FLICKERING in dimensions else per_prompt
        longest = video_name(prompt, count - 1)
        if "/" in prompt or "\0" in prompt or len(longest.encode()) > _NAME_MAX:
            raise UserError(f"the prompt {prompt!r} cannot be the name of a file: it has a '/', or too many letters")
        videos = [{"file": video_name(prompt, index), "seed": video_seed(seed, prompt, index)} for index in range(count)]
        line = {"prompt": prompt, "dimensions": dimensions, "extended": extended[prompt] if extended else None, "videos": videos}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def videos_of(manifest: str, dimensions: Sequence[str]) -> list[Video]:
    """The videos that these dimensions look at."""
    lines = [json.loads(line) for line in manifest.split("\n")[:-1]]
    wanted = [line for line in lines if not set(dimensions).isdisjoint(line["dimensions"])]
    return [Video(video["file"], line["extended"] or line["prompt"], video["seed"]) for line in wanted for video in line["videos"]]


# Results ---------------------------------------------------------------------------------------------------------------------------


def total_score(quality: float, semantic: float) -> float:
    """Return VBench's total of the quality and the semantic score."""
    return (4 * quality + semantic) / 5


@dataclass(frozen=True)
class VBenchScores:
    """The scores that VBench gives a generator; everything from 0 to 1.

    raw: the score of each of the 16 dimensions. videos: how many it is the mean of, where the file says that.
    """

    raw: Mapping[str, float]
    videos: Mapping[str, int | None]

    def normalized(self, name: str) -> float:
        """Return a dimension's score on the scale from 0 to 1 of the paper."""
        low, high, _ = DIMENSIONS[name]
        return (self.raw[name] - low) / (high - low)

    def means(self) -> dict[str, float]:
        """Quality, Semantic and Total."""
        quality, semantic = self._mean(QUALITY), self._mean(SEMANTIC)
        return {"Quality": quality, "Semantic": semantic, "Total": total_score(quality, semantic)}

    def _mean(self, dimensions: Mapping[str, Dimension]) -> float:
        weights = sum(dimension.weight for dimension in dimensions.values())
        return sum(dimension.weight * self.normalized(name) for name, dimension in dimensions.items()) / weights

    def summary(self) -> dict[str, Any]:
        """Return the scores for JSON."""
        dimensions = {
            name: {"raw": self.raw[name], "normalised": self.normalized(name), "videos": self.videos[name]} for name in DIMENSIONS
        }
        return self.means() | {"dimensions": dimensions}


def read_result(path: Path) -> dict[str, tuple[float, int | None]]:
    """Score and number of videos of every dimension in a file of results.

    Raises:
        UserError: it cannot be read, is something else, or a score is no fraction.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = {name.replace(" ", "_"): (float(entry[0]), *entry[1:2]) for name, entry in results.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"cannot read results from {path}: {_reason(error)}; expected VBench's {{dimension: [score, videos]}}") from None
    for name, (score, *_) in found.items():
        if name not in DIMENSIONS:
            raise UserError(f"{path} has the dimension {name!r}; VBench's are {', '.join(DIMENSIONS)}")
        # Cosines of random videos can lie below 0, a little.
        if not -1 <= score <= 1:
            raise UserError(f"{path} has {name} = {score}; expected a fraction: score it again, or divide a percentage by 100")
    return {name: (score, len(more[0]) if more and isinstance(more[0], list) else None) for name, (score, *more) in found.items()}


def read_scores(files: Sequence[Path]) -> VBenchScores:
    """The 16 dimensions from files of results.

    Raises:
        UserError: a dimension is missing, or two files disagree about one; or as `read_result`.
    """
    found: dict[str, tuple[float, int | None]] = {}
    source: dict[str, Path] = {}
    for file in files:
        for name, result in read_result(file).items():
            if found.get(name, result) != result:
                raise UserError(f"{source[name]} and {file} both have {name}, with different scores; keep one of them")
            found[name], source[name] = result, file
    if missing := [name for name in DIMENSIONS if name not in found]:
        raise UserError(f"there is no total without {', '.join(missing)}: score the missing dimensions first")
    return VBenchScores({name: found[name][0] for name in DIMENSIONS}, {name: found[name][1] for name in DIMENSIONS})


def _lines(path: Path) -> list[str]:
    """Split at line feeds alone: texts of a language model hold other separators that `splitlines` would count."""
    return [line.strip() for line in read_text(path, "prompts").rstrip().split("\n")]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
