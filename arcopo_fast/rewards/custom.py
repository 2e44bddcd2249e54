"""A reward of one's own: any function or class that can be imported, named in a recipe by its path.

    # my_package/my_module.py
    def brightness(frames, prompts):      # [N, F, 3, H, W] float32 in [0, 1] and N sentences
        return frames.mean((1, 2, 3, 4))  # N numbers, higher is better

    class Look:
        scores = ("contrast", "color")    # what one call gives

        def __call__(self, frames, prompts):
            return {"contrast": frames.std((3, 4)).mean((1, 2)), "color": frames.std(2).mean((1, 2, 3))}

    rewards: {"my_package.my_module:brightness": 1.0, "my_package.my_module:Look:contrast": 0.5, "my_package.my_module:Look:color": 0.5}

A class is made without arguments, once, and its objects are called. It may be a torch module, or load weights. It may also have any of the
attributes `bytes`, `fps` and `sources`, see `Reward`; on a judge that has `fps` it is set to the rate of the videos.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.rewards.base import Reward, Sources, exit_told
from arcopo_fast.rewards.fingerprint import code_and_weights


class Declared(NamedTuple):
    """A user's own description of a function or class, see `Reward`; none of it is required.

    scores: its own names for them; if there are fewer than two, its score has the name of the path.
    """

    scores: Sequence[str] = ()
    bytes: int = 0
    sources: Sources = ()


def declared(path: str, found: Any) -> Declared:
    """Return what the object at a path says of itself, before it is made.

    Raises:
        UserError: its `scores` are not names.
    """
    kind = found if isinstance(found, type) or inspect.isroutine(found) else type(found)
    scores = getattr(kind, "scores", ())
    if not isinstance(scores, list | tuple) or not all(isinstance(name, str) and name and ":" not in name for name in scores):
        raise UserError(f"reward {path!r} has scores {scores!r}; expected their names, as in scores = ('contrast', 'color')")
    return Declared(tuple(scores), getattr(found, "bytes", 0), getattr(found, "sources", ()))


NOTHING = Declared()


class CustomReward(nn.Module, Reward):
    """A user's function of (frames, prompts), or an object that is called so, with the whole protocol of a reward.

    A torch module, so that one inside it goes where it is sent.

    path: package.module:function, and so the name of its score; of several scores each is named path:score.
    function: returns a tensor, an array or a list of N numbers, in a list None for a video that could not be scored; see `as_scores`. For
        several scores it returns a dictionary of them, by its own names.
    """

    def __init__(self, path: str, function: Callable[[Tensor, list[str]], Any], about: Declared = NOTHING) -> None:
        super().__init__()
        self.path = path
        self.function: Any = function
        self.scores = tuple(f"{path}:{name}" for name in about.scores) if len(about.scores) > 1 else (path,)
        self._own = dict(zip(self.scores, about.scores))
        self.bytes, self.sources = about.bytes, about.sources
        self._by_seconds = hasattr(function, "fps")

    @property
    def fps(self) -> float | None:
        return float(self.function.fps or 0) if self._by_seconds else None

    @fps.setter
    def fps(self, rate: float | None) -> None:
        self.function.fps = rate

    def forward(self, frames: Tensor, prompts: list[str]) -> Any:
        return self._renamed(self.function(frames, prompts))

    def ask(self, names: Sequence[str], frames: Tensor, prompts: list[str]) -> Mapping[str, Any]:
        if isinstance(self.function, Reward) and self._own:  # it may have passes that it can leave out
            return self._renamed(self.function.ask([self._own[name] for name in names], frames, prompts))
        return super().ask(names, frames, prompts)

    def fingerprint(self, name: str) -> str:
        return code_and_weights(self.function, sys.modules.get(self.path.partition(":")[0]))

    def _renamed(self, returned: Any) -> Any:
        """Put the recipe's names in the place of the function's own, if these are what it returned."""
        if self._own and isinstance(returned, Mapping):
            return {name: returned[own] for name, own in self._own.items() if own in returned}
        return returned


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
        raise UserError(
            f"{what} {path!r}: when it is imported, {place} {exit_told(error)}; a module should only define functions and classes"
        ) from error
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


def load_custom(path: str) -> CustomReward:
    """Return the reward at `package.module:name`: a function, a class that is made without arguments, or an object that can be called.

    Raises:
        UserError: it cannot be imported, or not be called with (frames, prompts). An error in its code keeps its traceback.
    """
    found = find(path, "reward")
    about = declared(path, found)
    if isinstance(found, type):
        _check_arguments(path, found, "it is made without arguments")
        try:
            found = found()
        except SystemExit as error:
            raise UserError(f"reward {path!r} {exit_told(error)} when it was made") from error
    if not callable(found):
        raise UserError(f"reward {path!r} is a {type(found).__name__}; expected a function, or a class whose objects can be called")
    _check_arguments(path, found, "it is called with (frames, prompts)", None, None)
    return CustomReward(path, found, about)


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
