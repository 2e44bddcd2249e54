"""A reward of one's own: any function or class that can be imported, named in a recipe by its path.

    # my_package/my_module.py
    def brightness(frames, prompts):      # [N, F, 3, H, W] float32 in [0, 1] and N sentences
        return frames.mean((1, 2, 3, 4))  # N numbers, higher is better

    rewards: {"my_package.my_module:brightness": 1.0}

A class is made without arguments, once, and its objects are called; one that is a torch module may load weights and say its `bytes`. An
attribute `fps`, if there is one, is set to the rate of the videos.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import as_scores, exit_told


class OwnReward(nn.Module):
    """A function of (frames, prompts) as a reward. A module, so that one inside it goes where it is sent.

    function: returns a tensor, an array or a list of N numbers; in a list, None for a video that could not be scored. See `as_scores`.
    """

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Any]) -> None:
        super().__init__()
        self.name = name
        self.function = function

    def forward(self, frames: Tensor, prompts: list[str]) -> Tensor:
        return as_scores(self.name, self.function(frames, prompts), len(frames))


def find(path: str, what: str) -> Any:
    """The object at `package.module:name`, imported.

    what: for messages, what is looked for.

    Raises:
        UserError: there is no such module or name, or the module cannot import what it needs. Anything else that goes wrong in the module
            keeps its traceback.
    """
    place, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*place.split("."), *name.split(".")]):
        raise UserError(f"{what} {path!r} is not a path; expected package.module:function")
    try:
        found: Any = importlib.import_module(place)
    except SystemExit as error:
        raise UserError(f"{what} {path!r}: when it is imported, {place} {exit_told(error)}; let it define things, and no more") from error
    except ImportError as error:
        here = isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}.")
        advice = "is its directory on PYTHONPATH?" if here else "install what it needs, or serve it from an environment that has it"
        raise UserError(f"{what} {path!r}: cannot import {place}: {error}; {advice}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [known for known in dir(found) if not known.startswith("_")], n=1)
            raise UserError(f"{what} {path!r}: {place} has no {part}" + (f"; did you mean {near[0]}?" if near else ""))
        found = getattr(found, part)
    return found


def load_own(path: str) -> OwnReward:
    """The reward at `package.module:name`: a function, a class that is made without arguments, or an object that can be called.

    Raises:
        UserError: it cannot be imported, or not be called with (frames, prompts). An error in its code keeps its traceback.
    """
    found = find(path, "reward")
    if isinstance(found, type):
        _check_arguments(path, found, "it is made without arguments")
        try:
            found = found()
        except SystemExit as error:
            raise UserError(f"reward {path!r} {exit_told(error)} when it was made") from error
    if not callable(found):
        raise UserError(f"reward {path!r} is a {type(found).__name__}; expected a function, or a class whose objects can be called")
    _check_arguments(path, found, "it is called with (frames, prompts)", None, None)
    return OwnReward(path, found)


def _check_arguments(path: str, function: Callable[..., Any], expected: str, *arguments: None) -> None:
    """Say now, not after the first videos were made, that a function takes something else."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # one written in C does not say
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise UserError(f"reward {path!r} takes {signature}; {expected}") from None
