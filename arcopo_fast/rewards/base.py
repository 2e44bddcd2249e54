"""What a reward is, and how several of them judge the same videos.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arcopo_fast.errors import UserError

SLOW = 120.0
"""Seconds after which a reward that is still judging is named on stderr; then after twice as many, and so on."""


class Reward(Protocol):
    """Judges videos. Deterministic, and each video's score depends on that video and its prompt alone."""

    name: str

    def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
        """Score videos: frames [N, F, 3, H, W] fp32 in [0, 1] and one prompt for each -> [N] fp32, higher is better.

        A video that cannot be scored gets NaN. The frames must not be changed: the other rewards, and whoever saves them, see them too.
        """
        ...


class RewardError(UserError):
    """A reward did what no reward may do, or gives no scores. The message names it."""


class FramesNotFinite(UserError):
    """The generator made frames that are NaN or infinite. The message names the video."""


@torch.no_grad()
def score(rewards: Mapping[str, Reward], frames: Tensor, prompts: list[str], *, quarantine: bool = False) -> dict[str, Tensor]:
    """Every reward's scores [N] fp32, under its key, in order, on the frames' device.

    Args:
        rewards: by the name under which the scores are logged.
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
    for name, reward in rewards.items():
        returned = _call(name, reward, frames, prompts)
        if _form(frames) != form or not torch.equal(_checksum(frames), checksum):
            raise RewardError(f"reward {name!r} changed the frames in place, which others judge and save; let it work on frames.clone()")
        scores = as_scores(name, returned, len(frames)).to(frames.device)
        finite = scores.isfinite()
        if not finite.all():
            if not quarantine:
                video = int((~finite).nonzero()[0])
                raise RewardError(f"reward {name!r} returned {float(scores[video])} for video {video} ({prompts[video]!r})")
            # The same text every time: Python shows it once.
            warnings.warn(f"reward {name!r} returned scores that are not finite; they are left out, and counted", stacklevel=3)
            scores = scores.where(finite, torch.nan)
        components[name] = scores
    return components


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
    """What a reward could change of a tensor besides its values, as `transpose_` and `requires_grad_` do."""
    return frames.shape, frames.dtype, frames.device, frames.requires_grad


def _checksum(frames: Tensor) -> Tensor:
    """Sums of the frames' bits along rows and along columns, modulo 2^32.

    A clone of the frames of a group is gigabytes. The tensor's version counter is free, but sees no change through numpy and forbids
    writing the same values. Both directions are summed, so that frames, channels and pixels that change places are seen.
    """
    bits = frames.detach().view(torch.int32)
    return torch.cat([bits.sum(dim, dtype=torch.int32).flatten() for dim in (3, 4)])


# The call --------------------------------------------------------------------------------------------------------------------------


def _call(name: str, reward: Reward, frames: Tensor, prompts: list[str]) -> Any:
    """What a reward returns, whatever it is. It gets a list of prompts of its own."""
    try:
        with _watched(name, len(frames)):
            return reward(frames, list(prompts))
    except SystemExit as error:
        raise RewardError(f"reward {name!r} {exit_told(error)}; let it return NaN for what it cannot judge") from error
    except (KeyboardInterrupt, UserError):  # the user's; and one that says what to do
        raise
    except BaseException as error:
        note = f"raised by reward {name!r}"
        if sys.version_info >= (3, 11):
            error.add_note(note)
        else:
            print(f"{type(error).__name__} {note}", file=sys.stderr, flush=True)
        raise


def exit_told(error: SystemExit) -> str:
    """What ended somebody's code, for a message: it would have ended the program without a word."""
    places = [place for place in traceback.extract_tb(error.__traceback__) if place.filename != __file__]
    where = f" at {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
    return f"called sys.exit({'' if error.code is None else repr(error.code)}){where}"


@contextmanager
def _watched(name: str, videos: int) -> Iterator[None]:
    """Say on stderr that a reward takes long. It cannot be ended: it is somebody's code in this process."""
    done = threading.Event()

    def say() -> None:
        begun, pause = time.monotonic(), SLOW
        while not done.wait(pause):
            pause = time.monotonic() - begun  # twice as long in all
            print(f"reward {name!r} has been judging {videos} videos for {pause:.0f} s", file=sys.stderr, flush=True)

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
