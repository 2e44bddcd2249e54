"""The history of a video in the making: what its cached keys and values were made of.

The keys and values of a window are no function of the window's latents: each clean pass saw the context before it. So a history lists what
happened, finished chunks and prompts, and `VideoCache.replay` says which of it has to happen again to make the keys and values anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Appended(NamedTuple):
    """A chunk of finished latents [1, F, C, h, w] was added, the first of which is frame `frame` of the video."""

    frame: int
    latents: Tensor

    @property
    def end(self) -> int:
        """Number of the frame after the chunk."""
        return self.frame + self.latents.shape[1]


class Switched(NamedTuple):
    """The prompt changed to `text` [1, length, text_dim] when the next frame of the video was `frame`."""

    frame: int
    text: Tensor


Event = Appended | Switched


class Replayed(NamedTuple):
    """An event that happens again.

    Attributes:
        cached: keys and values are written; else the frames serve only what is written later.
    """

    event: Event
    cached: bool


@dataclass
class History:
    """The events of a video in the making, or those of them that are still needed.

    Attributes:
        text: the prompt that it began with, [1, length, text_dim].
        events: in their order.
    """

    text: Tensor
    events: list[Event] = field(default_factory=list)

    @classmethod
    def of(cls, text: Tensor, chunks: Sequence[Tensor]) -> History:
        """Return the history of a video that begins with finished chunks [1, F, C, h, w], under one prompt."""
        history = cls(text)
        for chunk in chunks:
            history.append(chunk)
        return history

    def append(self, latents: Tensor) -> None:
        """Note that a chunk was added."""
        self.events.append(Appended(self.frame, latents))

    def switch(self, text: Tensor) -> None:
        """Note that the prompt changed."""
        self.events.append(Switched(self.frame, text))

    @property
    def frame(self) -> int:
        """Number of the next frame of the video."""
        last = self.events[-1] if self.events else None
        return last.end if isinstance(last, Appended) else last.frame if last else 0

    @property
    def chunks(self) -> list[Appended]:
        """Chunks that are kept, in their order."""
        return [event for event in self.events if isinstance(event, Appended)]

    @property
    def prompt(self) -> Tensor:
        """Prompt that counts now."""
        return next((event.text for event in reversed(self.events) if isinstance(event, Switched)), self.text)

    def newest(self, frames: int | None) -> list[Tensor]:
        """Return the newest whole chunks that hold so many frames, or as many as there are without a gap; None: all that there are."""
        found: list[Tensor] = []
        oldest = self.frame
        for chunk in reversed(self.chunks):
            if chunk.end != oldest or (frames is not None and self.frame - oldest >= frames):
                break
            found.insert(0, chunk.latents)
            oldest = chunk.frame
        return found

    def copy(self) -> History:
        """Return a history that goes on apart from this one."""
        return History(self.text, list(self.events))

    def move(self, device: torch.device | str, *, before: int | None = None) -> None:
        """Move latents to a device: all, or of the chunks that end at frame `before` at the latest. Copies of this history keep theirs."""

        def moved(event: Event) -> Event:
            if isinstance(event, Switched) or (before is not None and event.end > before):
                return event
            return event._replace(latents=event.latents.to(device))

        self.events = [moved(event) for event in self.events]

    def trim(self, needed: Sequence[Replayed], frames: int | None) -> None:
        """Drop the events that are not `needed`, but for the newest chunks that hold so many frames; None: drop nothing."""
        if frames is None:
            return
        kept = {id(replayed.event) for replayed in needed}
        oldest = self.frame - frames
        self.events = [event for event in self.events if id(event) in kept or (isinstance(event, Appended) and event.end > oldest)]
