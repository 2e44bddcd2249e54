"""The view that rewards have of a group's videos: which latent frames are decoded, which windows are cut from their pixels, and under which
prompts they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.rewards.base import Reward, score


@dataclass(frozen=True)
class Part:
    """Latent frames of a video that are judged under one prompt; None: the video's own."""

    frames: range
    prompt: str | None = None


def parts(frames: range, switches: Mapping[int, str], shortest: int) -> list[Part]:
    """Return latent frames of a video whose prompt changes, cut where it does. A part that is too short to be judged joins its neighbor.

    Args:
        frames: at least one.
        switches: each prompt by the latent frame from which on it counts; one counts from frame 0 on. None: a part has the video's own.
        shortest: frames of a part, at least; one that has fewer joins the part before it, and the first one the part after it.
    """
    if not switches:
        return [Part(frames)]
    starts = sorted({max(start, frames.start) for start in switches if start < frames.stop})
    found = [
        Part(range(start, stop), switches[max(switch for switch in switches if switch <= start)])
        for start, stop in zip(starts, [*starts[1:], frames.stop])
    ]
    while len(found) > 1 and (short := next((n for n, part in enumerate(found) if len(part.frames) < shortest), None)) is not None:
        keeps, joins = (found[1], found[0]) if short == 0 else (found[short - 1], found[short])
        first, stop = min(keeps.frames.start, joins.frames.start), max(keeps.frames.stop, joins.frames.stop)
        found[max(0, short - 1) : max(0, short - 1) + 2] = [Part(range(first, stop), keeps.prompt)]
    return found


@dataclass(frozen=True)
class Window:
    """The part of a video that some rewards see.

    Attributes:
        rewards: their names, by the names of the scores that they give here.
        parts: one after the other, each judged by itself; a score is their mean, weighted by their frames.
    """

    rewards: Mapping[str, str]
    parts: Sequence[Part]

    @property
    def frames(self) -> range:
        """The latent frames of all parts."""
        return range(self.parts[0].frames.start, self.parts[-1].frames.stop)


@dataclass(frozen=True)
class View:
    """The latent frames of a group's videos that are decoded once for all of its windows.

    Attributes:
        frames: whose pixels are kept.
        warmup: how many before them are decoded for the decoder's state alone, and dropped.
        windows: cut from the pixels; at least one.
    """

    frames: range
    warmup: int
    windows: Sequence[Window]

    @classmethod
    def of(cls, config: Config, pivot: int, prompt: Prompt | None = None) -> View:
        """Return what a recipe's `judge` says, for groups that fork at the chunk `pivot`, counted from 0.

        A window ends with the branches. The view begins at the pivot chunk at the latest: up to there the branches are one video.

        Args:
            prompt: of the videos. A window in which it changes is judged in parts. None: it does not change.
        """
        sizes, judge, horizon = config.video.chunk_sizes, config.judge, config.rollout.horizon
        starts = list(accumulate(sizes[:-1], initial=0))
        switches = {start: part.text for start, part in prompt.at_chunks(starts).items()} if prompt and prompt.turns else {}
        windows = []
        for name, window in judge.seen.items():
            last = min(after for after in (window.chunks[1], horizon, len(sizes)) if after is not None)
            frames = range(window.first_frame(pivot, sizes), sum(sizes[: pivot + last + 1]))
            windows.append(Window(config.scores_of(name), parts(frames, switches, config.video.chunk_frames)))
        first = min(sum(sizes[:pivot]), *(window.frames.start for window in windows))
        stop = max(window.frames.stop for window in windows)
        return cls(range(first, stop), first if judge.warmup == "all" else min(first, judge.warmup), windows)

    def pixels(self, frames: range, factor: int) -> slice:
        """Return where latent `frames` lie among the pixel frames, of which a latent gives `factor`, but a video's first only one."""
        shorter = factor - 1 if self.frames.start == 0 else 0
        first, stop = (max(0, factor * (edge - self.frames.start) - shorter) for edge in (frames.start, frames.stop))
        return slice(first, stop)

    def judge(
        self, rewards: Mapping[str, Reward], frames: Tensor, prompts: list[str], factor: int, *, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the scores [n] of all windows by name, on the frames' device; NaN where a reward failed.

        Args:
            rewards: by name.
            frames: the view's, [n, F, 3, H, W] in [0, 1].
            prompts: n of them, for parts without one of their own.
            factor: see `pixels`.
            names: the scores that are wanted; None: all.
        """
        scores: dict[str, Tensor] = {}
        for window in self.windows:
            wanted = {name: reward for name, reward in window.rewards.items() if names is None or name in names}
            judges = {reward: rewards[reward] for reward in wanted.values()}  # a judge knows its scores by the rewards' names
            found: list[dict[str, Tensor]] = []
            for part in window.parts if judges else ():
                own = prompts if part.prompt is None else [part.prompt] * len(prompts)
                seen = score(judges, frames[:, self.pixels(part.frames, factor)].contiguous(), own, quarantine=True)
                found.append({reward: len(part.frames) / len(window.frames) * values for reward, values in seen.items()})
            scores |= {name: torch.stack([shares[reward] for shares in found]).sum(0) for name, reward in wanted.items()}
        return scores
