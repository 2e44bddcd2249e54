"""The whole protocol of a reward, and how several rewards judge the same videos.

Knows nothing of how the videos were made, nor of weights and advantages. A reward may be anybody's code: what it is given and what it
returns are checked here, through which all judging goes.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.fingerprint import code_and_weights

Sources = Sequence[tuple[str, Sequence[str]]]
"""Published files: each source, see `storage.hub.find`, with the names of what is needed of it."""

SLOW = 120.0
"""Seconds after which a reward that is still judging is named on stderr; then after twice as many, and so on."""


class Reward(ABC):
    """A judge of videos that gives one score or several. Deterministic: a video's scores depend on that video and its prompt alone.

    A subclass has `scores` and can be called; the rest has defaults. What users write need not be a subclass, see `custom`.

    scores: the names of its scores, as recipes have them.
    bytes: GPU memory that it takes, for its weights and its working set.
    fps: frames per second of the videos, which whoever loads the judge sets; None for a judge that does not go by seconds.
    sources: the published files that it reads.
    """

    scores: Sequence[str]
    bytes: int = 0
    fps: float | None = None
    sources: Sources = ()

    @abstractmethod
    def __call__(self, frames: Tensor, prompts: list[str]) -> Any:
        """Score videos, higher is better; NaN for a video that cannot be scored.

        The frames must not be changed: the other rewards, and whoever saves them, see them too.

        Args:
            frames: [N, F, 3, H, W] fp32 in [0, 1].
            prompts: one for each video.

        Returns:
            [N] fp32, or for several scores a dictionary of such tensors by the names in `scores`.
        """

    def ask(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> Mapping[str, Any]:
        """Return the scores of these names, of which there is at least one, and perhaps others; arguments as for a call.

        A judge whose scores do not all come from one forward pass does here only what is asked for.

        Raises:
            RewardError: a score is missing.
        """
        returned = self(frames, prompts)
        if isinstance(returned, Mapping) and all(name in returned for name in names):
            return returned
        if len(names) == 1:
            return {names[0]: returned}  # `score` says whether it is one
        given = f"a {type(returned).__name__}"
        if isinstance(returned, Mapping):
            given += " without " + ", ".join(repr(name) for name in names if name not in returned)
        raise RewardError(f"reward {_listed(names)} returned {given}; expected a dictionary with the scores of each by its name")

    def fingerprint(self, name: str) -> str:
        """Return 16 hexadecimal digits that tell the code and the weights behind a score from those before an edit or an update."""
        return code_and_weights(self)


class RewardError(UserError):
    """A reward did what no reward may do, or gives no scores. The message names it."""


class FramesNotFinite(UserError):
    """The generator made frames that are NaN or infinite. The message names the video."""


@torch.no_grad()
def score(rewards: Mapping[str, Reward], frames: Tensor, prompts: list[str], *, quarantine: bool = False) -> dict[str, Tensor]:
    """Return the scores [N] fp32 by name, in the order of `rewards`, on the frames' device. A judge of several scores is asked once.

    Args:
        rewards: the judge of each score, by the score's name.
        frames: [N, F, 3, H, W] fp32 in [0, 1].
        prompts: N sentences.
        quarantine: a score that is not finite becomes NaN, with a warning, instead of an error. Whoever averages must leave NaN out.

    Raises:
        ValueError: wrong shapes or dtype.
        FramesNotFinite: no reward was asked: some would turn NaN into black pixels, and give a score.
        RewardError: a reward changed the frames, returned something else than N numbers or a score that is not finite, or called
            `sys.exit`. Any other exception of a reward is raised as it is, with its name.
    """
    if frames.dim() != 5 or frames.shape[2] != 3 or frames.dtype != torch.float32 or not frames.numel():
        raise ValueError(f"rewards judge fp32 frames [N, F, 3, H, W], not {frames.dtype} {list(frames.shape)}")
    if len(prompts) != len(frames):
        raise ValueError(f"{len(frames)} videos need {len(frames)} prompts, not {len(prompts)}")
    _check_finite(frames, prompts)

    components: dict[str, Tensor] = {}
    form, checksum = _form(frames), _checksum(frames)
    for reward, names in _judges(rewards):
        returned = _call(names, reward, frames, prompts)
        if _form(frames) != form or not torch.equal(_checksum(frames), checksum):
            raise RewardError(
                f"reward {_listed(names)} changed the frames in place, which others judge and save; let it work on frames.clone()"
            )
        for name in names:
            scores = as_scores(name, returned[name], len(frames)).to(frames.device)
            finite = scores.isfinite()
            if not finite.all():
                if not quarantine:
                    video = int((~finite).nonzero()[0])
                    raise RewardError(f"reward {name!r} returned {float(scores[video])} for video {video} ({prompts[video]!r})")
                # The same text every time: Python shows it once.
                warnings.warn(f"reward {name!r} returned scores that are not finite; they are left out, and counted", stacklevel=3)
                scores = scores.where(finite, torch.nan)
            components[name] = scores
    return {name: components[name] for name in rewards}


def _judges(rewards: Mapping[str, Reward]) -> list[tuple[Reward, list[str]]]:
    """Return each judge once, with the names of the scores that it shall give."""
    found: dict[int, tuple[Reward, list[str]]] = {}
    for name, reward in rewards.items():
        found.setdefault(id(reward), (reward, []))[1].append(name)
    return list(found.values())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


# The frames ------------------------------------------------------------------------------------------------------------------------


def _check_finite(frames: Tensor, prompts: list[str]) -> None:
    if all(bound.isfinite() for bound in frames.aminmax()):  # NaN is both; needs no memory, as `isfinite` of all frames would
        return
    video = next(index for index, its_frames in enumerate(frames) if not its_frames.isfinite().all())
    raise FramesNotFinite(
        f"video {video} of {len(frames)} ({prompts[video]!r}) has frames that are not finite, so nothing can judge it: the adapter has "
        "gone too far (take an earlier checkpoint, or a smaller scale, and train with a smaller optimizer.lr), or a number was too large "
        "for generator.dtype or generator.vae_dtype (float32 tells)"
    )


def _form(frames: Tensor) -> tuple[object, ...]:
    """Return what a reward could change of a tensor besides its values, as `transpose_` and `requires_grad_` do."""
    return frames.shape, frames.dtype, frames.device, frames.requires_grad


def _checksum(frames: Tensor) -> Tensor:
    """Return sums of the frames' bits along rows and along columns, modulo 2^32.

    A clone of the frames of a group is gigabytes. The tensor's version counter is free, but sees no change through numpy and forbids
    writing the same values. Both directions are summed, so that frames, channels and pixels that change places are seen.
    """
    bits = frames.detach().view(torch.int32)
    return torch.cat([bits.sum(dim, dtype=torch.int32).flatten() for dim in (3, 4)])


# The call --------------------------------------------------------------------------------------------------------------------------


def _call(names: list[str], reward: Reward, frames: Tensor, prompts: list[str]) -> Mapping[str, Any]:
    """Return what a reward gives under these names, whatever it is. It gets a list of prompts of its own."""
    try:
        with _watched(names, len(frames)):
            return reward.ask(names, frames, list(prompts))
    except SystemExit as error:
        raise RewardError(f"reward {_listed(names)} {exit_told(error)}; let it return NaN for what it cannot judge") from error
    except (KeyboardInterrupt, UserError):  # the user's; and one that says what to do
        raise
    except BaseException as error:
        note = f"raised by reward {_listed(names)}"
        if sys.version_info >= (3, 11):
            error.add_note(note)
        else:
            print(f"{type(error).__name__} {note}", file=sys.stderr, flush=True)
        raise


def exit_told(error: SystemExit) -> str:
    """Return what ended somebody's code, for a message: it would have ended the program without a word."""
    places = [place for place in traceback.extract_tb(error.__traceback__) if place.filename != __file__]
    where = f" at {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
    return f"called sys.exit({'' if error.code is None else repr(error.code)}){where}"


@contextmanager
def _watched(names: list[str], videos: int) -> Iterator[None]:
    """Say on stderr that a reward takes long. It cannot be ended: it is somebody's code in this process."""
    done = threading.Event()

    def say() -> None:
        begun, pause = time.monotonic(), SLOW
        while not done.wait(pause):
            pause = time.monotonic() - begun  # twice as long in all
            print(f"reward {_listed(names)} has been judging {videos} videos for {pause:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=say, name="watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()


# The scores ------------------------------------------------------------------------------------------------------------------------


def as_scores(name: str, returned: Any, count: int) -> Tensor:
    """The scores [count] fp32 that a reward returned: in a tensor, an array, a list or a tuple, in which None is no score.

    Always a copy: a reward may use its own tensor again. Integers and booleans are numbers. A scalar for one video, or [count, 1], are
    refused: with another number of videos they may mean something else.

    Raises:
        RewardError: it is anything else.
    """
    scores, described = _real(returned), "None" if returned is None else f"a {type(returned).__name__}"
    if isinstance(returned, Tensor | np.ndarray):
        described += f" of {str(returned.dtype).removeprefix('torch.')}, shape {list(returned.shape)}"
    if isinstance(returned, (list, tuple)) or (isinstance(returned, np.ndarray) and returned.dtype == object and returned.ndim == 1):
        items = [_real(math.nan if item is None else item) for item in returned]
        odd = next((item for item, number in zip(returned, items) if number is None or number.dim()), None)
        described += f" of {len(returned)}" + ("" if odd is None else f" in which there is a {type(odd).__name__}")
        scores = torch.stack([item for item in items if item is not None]) if odd is None and items else torch.empty(0)
    if scores is None or scores.shape != (count,):
        expected = f"expected [{count}], one number for each video, as a tensor, an array or a list"
        raise RewardError(f"reward {name!r} returned {described}; {expected}")
    return scores


def _real(value: Any) -> Tensor | None:
    """An fp32 copy, of the same shape, of a tensor, an array or a number; None for what does not hold real numbers."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)
        return value.detach().to(torch.float32, copy=True) if plain else None
    if not isinstance(value, int | float) and not hasattr(value, "__array__"):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.dtype.kind not in "biuf" or isinstance(value, np.ma.MaskedArray):  # what is masked has no score, and a number
        return None
    return torch.tensor(array.astype(np.float64)).float()
