"""What is decoded in slices needs the memory of one slice: nothing holds a former slice's frames, or the decoder's state after them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config
from arcopo_fast.model.vae import StreamingDecoder, VAECache
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.training.trainer import Trainer

SMALL = ["video.chunks=2", "sampler.steps=[1000, 350]", "rollout.group_size=3", "rollout.decode_branches=1", "rollout.pivot=1"]
SMALL += ["evaluation.prompts=3", "evaluation.videos_per_prompt=1", "evaluation.sample_videos=2", "objective.anchors_per_update=2"]


class Watched:
    """Decodes as `decoder` does, and counts the slices that were made while an earlier one was still held."""

    def __init__(self, decoder: StreamingDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Any]] = []
        self.held: list[int] = []
        self._decode = decoder.decode
        monkeypatch.setattr(decoder, "decode", self.decode)

    def decode(self, latents: Tensor, cache: VAECache) -> tuple[Tensor, VAECache]:
        self.held.append(sum(reference() is not None for reference in self.made))
        frames, after = self._decode(latents, cache)
        # A view shares its storage: whoever holds a part holds all of it.
        self.made += [weakref.ref(frames.untyped_storage()), weakref.ref(after)]
        return frames, after


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    config: Config = load_config("toy", SMALL)
    return Trainer(config)


def test_branches(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, shape = trainer.generator.decoder, trainer.shape
    prefix, tails = torch.randn(1, *shape.chunk(0)), torch.randn(3, *shape.chunk(1))
    whole = list(decode_branches(decoder, prefix, tails))[0]
    watched = Watched(decoder, monkeypatch)
    for branch, frames in enumerate(decode_branches(decoder, prefix, tails, branches_at_once=1)):
        torch.testing.assert_close(frames[0], whole[branch], rtol=0, atol=1e-5)
        del frames
    assert watched.held == [0, 2, 2, 2], "only what the prefix left: its frames, and the state that every branch goes on from"


def test_a_group_is_judged(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(trainer.generator.decoder, monkeypatch)
    with trainer.groups.judged(1, 0).group:
        assert watched.held == [0, 0, 0]


def test_an_evaluation(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(trainer.generator.decoder, monkeypatch)
    assert len(trainer.evaluate().frames) == 2
    assert len(watched.held) >= 3 and not any(watched.held)
