"""An update that runs out of memory goes on in smaller micro-batches, and gives what these give from the start."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Iterator

import pytest
import torch
from support.models import random_text, small_engine, small_model
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group, Samples
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.stream import VideoShape

SHAPE = VideoShape((1,) * 2, 8, 4, 6)
GROUP = 3  # all are anchors, at 3 steps: 9 pairs
SAID = "CUDA out of memory. Tried to allocate 3.00 GiB."
OUT_OF_MEMORY = torch.OutOfMemoryError(f"{SAID}\nGPU 0 has a total capacity of 24 GiB.")


class BackwardFails(torch.autograd.Function):
    """The identity, whose gradient runs out of memory."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        raise OUT_OF_MEMORY


class Small:
    """A card: more than `pairs` at once, or with `checkpointed` anything else than checkpointed passes with gradient, do not fit it.

    moment: what runs out, "forward", "backward" (once half of the blocks have their gradient) or "old predictions". after: so many of these
    fit whatever their size. calls: of every replay, whether gradient was enabled, and how many pairs there were.
    """

    def __init__(self, engine: Engine, moment: str, pairs: int, after: int = 0, checkpointed: bool = False) -> None:
        self.engine, self.moment, self.pairs, self.after, self.checkpointed = engine, moment, pairs, after, checkpointed
        self.predict, self.block = engine.predict, engine.model.blocks[1]
        self.calls: list[tuple[bool, int]] = []
        self.spoilt = False
        engine.predict = self  # type: ignore[method-assign, assignment]
        original = self.block.forward
        self.block.forward = lambda x, *rest: original(BackwardFails.apply(x) if self.spoilt else x, *rest)

    def __call__(self, group: Group, samples: Samples, **named: Any) -> Tensor:
        trained = torch.is_grad_enabled()
        self.calls.append((trained, len(samples)))
        fits = named.get("checkpoint", False) if self.checkpointed else len(samples) <= self.pairs
        concerned = trained != (self.moment == "old predictions")
        concerned = concerned and [grad for grad, _ in self.calls].count(trained) > self.after
        if concerned and not fits and self.moment != "backward":
            raise OUT_OF_MEMORY
        self.spoilt = concerned and not fits
        return self.predict(group, samples, **named)


class World:
    """A generator in the middle of training, or with a fresh adapter beside its reference; two groups; updates that always begin there."""

    def __init__(self, reference: bool = False) -> None:
        self.engine = small_engine(add_lora(small_model(), rank=4, alpha=8, seed=1), branches=2 * GROUP, shape=SHAPE)
        self.parameters, self.reference = adapter_parameters(self.engine.model), reference
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter) * (not reference))
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        seed = int(torch.randint(10**6, ()))
        noises = [KeyedNoise(SHAPE, GroupId(seed, group=index)) for index in range(2)]
        self.groups = [
            (self.engine.rollout(random_text(), noise.id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5)), zscore(torch.randn(GROUP)))
            for pivot, noise in enumerate(noises)
        ]

    def update(self, objective: CopoObjective) -> tuple[list[Tensor], dict[str, float]]:
        """Adapters after two updates, and their statistics."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.start):
                parameter.copy_(value)
        optimizer = torch.optim.SGD(self.parameters, lr=1.0)  # AdamW's first steps would magnify what is only rounding
        statistics = objective.update(self.groups, Stepper(optimizer, gradient_clip=1.0))
        return [parameter.detach().clone() for parameter in self.parameters], statistics

    def objective(self, **settings: Any) -> CopoObjective:
        return CopoObjective(self.engine, CopoSettings(clip=1e-3, **settings), reference=self.reference)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(reference: bool = False) -> World:
        made.append(World(reference))
        return made[-1]

    yield make
    for one in made:
        held = one.engine.pool.pages_in_use
        for group, _ in one.groups:
            group.release()
        assert one.engine.pool.pages_in_use == 0 < held, "a failed attempt must give its pages back"


@pytest.mark.parametrize("reference", [False, True], ids=["on-policy", "reference"])
@pytest.mark.parametrize(
    ("moment", "done"), [("old predictions", 0), ("old predictions", 2), ("forward", 0), ("forward", 1), ("backward", 1), ("backward", 2)]
)
def test_it_is_the_update_with_the_smaller_micro_batch(world: Callable[..., World], moment: str, done: int, reference: bool) -> None:
    """Bit for bit, if a replay of the first group fails, its first micro-batch or its second; up to rounding, if the next group's first.

    On-policy the old policy is asked in the second update: the first one had the larger micro-batches, which round differently.
    """
    one = world(reference)
    adapters, statistics = one.update(one.objective(micro_batch=2))
    card = Small(one.engine, moment, pairs=2, after=done)
    objective = one.objective(micro_batch=6)
    with pytest.warns(UserWarning) as warned:
        again, recorded = one.update(objective)
    assert [str(warning.message) for warning in warned] == [
        f"the replay ran out of memory ({SAID}); continuing with objective.micro_batch=2: set this in the recipe"
    ]
    assert {size for _, size in card.calls} == {6, 3, 2, 1}, "halved twice, and everything of this group made anew"
    assert statistics["update1/ratio_max"] == 0 < statistics["update2/ratio_max"]
    if done == 2 or (moment == "old predictions" and not reference):
        assert recorded == pytest.approx(statistics, rel=1e-3, abs=1e-7)
        for ours, theirs in zip(again, adapters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    else:
        assert recorded == statistics
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, adapters, strict=True))

    if reference and done == 2:
        return  # the reference's predictions of the first group are known by now, with the rounding of the second update's micro-batches

    # It stays at that, without a word.
    del card.calls[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.update(objective)[1].keys() == statistics.keys()
    assert {size for _, size in card.calls} == {2, 1} and objective.batching.micro_batch == 2


def test_what_runs_out_after_a_step_asks_the_old_policy_anew(world: Callable[..., World]) -> None:
    """In the smaller micro-batches; the first update was made in larger ones, which round differently."""
    one = world()
    adapters, statistics = one.update(one.objective(micro_batch=3))
    Small(one.engine, "backward", pairs=3, after=3)  # both groups' first update, and the first group's second
    with pytest.warns(UserWarning, match="objective.micro_batch=3: set this in the recipe"):
        again, recorded = one.update(one.objective())
    assert recorded.keys() == statistics.keys()
    for name, value in statistics.items():
        assert recorded[name] == pytest.approx(value, rel=1e-3, abs=1e-7), name
    for ours, theirs in zip(again, adapters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_single_pairs_are_checkpointed(world: Callable[..., World], moment: str) -> None:
    one = world()
    adapters, statistics = one.update(one.objective(micro_batch=1, checkpoint=True))
    Small(one.engine, moment, pairs=0, checkpointed=True)
    with pytest.warns(UserWarning, match=r"continuing with objective.micro_batch=1 objective.checkpoint=true: set this"):
        again, recorded = one.update(one.objective())
    assert recorded == statistics
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, adapters, strict=True))


def test_a_recomputed_context_is_made_anew(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    adapters, statistics = one.update(one.objective(micro_batch=3, context="recompute"))
    held = one.engine.pool.pages_in_use
    Small(one.engine, "backward", pairs=3)
    with pytest.warns(UserWarning, match="objective.micro_batch=3: set this in the recipe"):
        again, recorded = one.update(one.objective(context="recompute"))
    assert recorded == statistics and one.engine.pool.pages_in_use == held

    # Also where the context itself runs out, which no setting of the replay helps.
    def forward(*arguments: Any, store_only: bool = False, **named: Any) -> Any:
        if store_only:
            raise OUT_OF_MEMORY
        return original(*arguments, **named)

    original = one.engine.model.forward
    monkeypatch.setattr(one.engine.model, "forward", forward)
    with pytest.raises(UserError, match="ran out of memory"):
        one.update(one.objective(context="recompute"))
    assert one.engine.pool.pages_in_use == held
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, adapters, strict=True))


@pytest.mark.parametrize("moment", ["forward", "backward", "old predictions"])
def test_what_never_fits_is_said(world: Callable[..., World], moment: str) -> None:
    one = world(reference=moment == "old predictions")  # which is asked for before the first step
    card = Small(one.engine, moment, pairs=0)
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        one.update(one.objective())
    assert SAID in str(error.value) and "rollout.branches_per_wave=1" in str(error.value) and "\n" not in str(error.value)
    trained = moment != "old predictions"
    assert [size for grad, size in card.calls if grad == trained] == [9, 5, 3, 2, 1, 1], "the last one with checkpointing"
    assert all(torch.equal(parameter, value) for parameter, value in zip(one.parameters, one.start)), "no step was taken"


def test_other_errors_are_not_held_back(world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    monkeypatch.setattr(one.engine, "predict", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(RuntimeError, match="CUDA error"):
        one.update(one.objective())
