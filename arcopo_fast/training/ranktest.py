"""The rank test: what must be true of a job's ranks before they train together, tried with this job, recipe and generator.

    torchrun --nproc_per_node=8 -m arcopo_fast.doctor RECIPE [--self-test]

Ranks that differ in anything give an adapter that no single process would: this names them. Every rank finds the same and all must call it.
Nothing is written, nothing is kept.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import RankLost
from arcopo_fast.objectives.optimizer import Step, Stepper
from arcopo_fast.objectives.updates import Updates
from arcopo_fast.planning.spread import spread
from arcopo_fast.planning.work import lora_parameters
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import device_of
from arcopo_fast.storage.identity import version_of
from arcopo_fast.training.findings import Finding
from arcopo_fast.training.groups import Rollouts
from arcopo_fast.training.selftest import one_group
from arcopo_fast.training.trainer import Trainer

PATIENCE = 20.0
"""Seconds in which a small sum over all ranks must be there."""
REPEATS = 5
SAMPLES = 512
"""Elements that are compared of each tensor, at most."""
SAME_GRADIENT = {torch.float32: 1e-4}
SAME_LATENTS = {torch.float32: 1e-3}
"""Distances over size at which two ranks still compute the same, in batches of other shapes; in half precision `HALF`."""
HALF = 0.3


def rank_test(config: Config, world: World, *, update: bool) -> Iterator[Finding]:
    """Yield findings, one after the other, as they come; the same on every rank.

    Args:
        update: try one update, too. It takes the time of two groups.

    Raises:
        UserError: the recipe cannot be used.
    """
    yield _places(world)
    recipe = config.model_copy(update={"seed": 0}).model_dump_json()
    same_recipe = _alike(world, "the recipe", recipe)
    same = [same_recipe, _alike(world, "the seed", config.seed, str), _alike(world, "the versions", _versions(), str)]
    yield from same
    summed = _sum(world)
    yield summed
    if not (same_recipe.holds and summed.holds):
        yield Finding("everything else", None, "was not tried: such ranks cannot work together")
        return
    yield _speed(config, world)
    trainer = Trainer(one_update(config, world), world)
    alike = [_alike(world, f"the {name}", value) for name, value in trainer.inputs().items()]
    alike += [_precision(trainer), _alike(world, "the fresh adapter", trainer.checksum())]
    yield from alike
    if update and not all(finding.holds for finding in [*same, *alike]):
        yield Finding("an update", None, "was not tried: the ranks do not begin with the same")
    elif update:
        yield from _update(trainer)


def one_update(config: Config, world: World) -> Config:
    """Return the recipe with one group for each team, and one update of it."""
    config, teams = one_group(config), spread(config, world.size).teams
    rollout = config.rollout.model_copy(update={"prompts_per_iteration": teams})
    return config.model_copy(update={"rollout": rollout, "objective": config.objective.model_copy(update={"updates": 1})})


# Without weights -------------------------------------------------------------------------------------------------------------------


def _places(world: World) -> Finding:
    """Say where the ranks are, and how they talk."""
    machines = list(dict.fromkeys(world.gathered(socket.gethostname())))
    where = f"{world.size} on {', '.join(machines[:4])}{f' and {len(machines) - 4} more machines' if len(machines) > 4 else ''}"
    return Finding("the ranks", None, f"{where}; tensors go over {world.backend}, messages over gloo")


def _versions() -> dict[str, str | None]:
    return {package: version_of(package) for package in ("torch", "arcopo_fast")}


def _alike(world: World, subject: str, value: Any, shown: Any = None) -> Finding:
    """Check that all ranks have an equal value; those that have another than most are named. shown: gives the words for a value."""
    values = world.gathered(value)
    usual = max(values, key=values.count)
    odd = [rank for rank, other in enumerate(values) if other != usual]
    if not odd:
        return Finding(subject, True, "the same on every rank")
    told = f": {shown(values[odd[0]])} instead of {shown(usual)}" if shown else ""
    return Finding(subject, False, f"{_named(odd)} of {world.size} {_verb(odd, 'has', 'have')} another than the others{told}")


def _sum(world: World) -> Finding:
    """Check that a sum over all ranks is the sum, on each of them. It has channels of its own: a rank that takes no part breaks them."""
    numbers = torch.arange(1000, dtype=torch.float64)
    probe, sums = world.team(world.size, timeout=min(PATIENCE, world.timeout / 2)), numbers * (world.rank + 1)
    try:
        probe.sum_([sums])
        outcome = "right" if torch.equal(sums, numbers * sum(range(world.size + 1))) else "wrong"
    except RankLost:
        outcome = "late"
    outcomes = world.gathered(outcome)
    wrong, late = ([rank for rank, other in enumerate(outcomes) if other == kind] for kind in ("wrong", "late"))
    if not (wrong or late):
        return Finding("a sum over the ranks", True, "right on every rank")
    parts = [f"{_named(wrong)} {_verb(wrong, 'does', 'do')} not get the sum of all: gradients would not be summed"] if wrong else []
    parts += [f"{_named(late)} waited for the others in vain"] if late else []
    return Finding("a sum over the ranks", False, "; ".join(parts))


def _speed(config: Config, world: World) -> Finding:
    """Measure the sum of an adapter's gradient, as an update makes it."""
    sizes = generator_sizes(config.generator.checkpoint, config.generator.base)
    device = device_of(config.generator.device)
    tensor = torch.zeros(lora_parameters(config, sizes.transformer), dtype=torch.float64, device=device)
    taken = []
    for _ in range(1 + REPEATS):
        world.meet("measure the sum of a gradient")
        began = perf_counter()
        world.sum_([tensor])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(perf_counter() - began)
    seconds = max(world.gathered(median(taken[1:])))
    rate = 2 * (world.size - 1) / world.size * tensor.nbytes / seconds / 1e9
    size = f"{tensor.nbytes / 1e6:.3g} MB, a gradient in float64, in {1e3 * seconds:.3g} ms"
    return Finding("the all-reduce", None, f"{size}: each rank sends {rate:.2g} GB/s")


# With weights ----------------------------------------------------------------------------------------------------------------------


def _precision(trainer: Trainer) -> Finding:
    """Check that every rank has its adapter in float32."""
    kinds = trainer.world.gathered(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trainer.parameters}))
    odd = [rank for rank, names in enumerate(kinds) if names != ["float32"]]
    if not odd:
        return Finding("the adapter's precision", True, "float32 on every rank")
    return Finding("the adapter's precision", False, f"{_named(odd)} {_verb(odd, 'has', 'have')} {', '.join(kinds[odd[0]])}, not float32")


class _Look(Stepper):
    """Takes steps, and keeps some elements of the gradient that the last one was given."""

    gradient = torch.zeros(0)

    def take(self) -> Step:
        gradients = [parameter.grad for group in self.optimizer.param_groups for parameter in group["params"]]
        self.gradient = _elements(gradient for gradient in gradients if gradient is not None)
        return super().take()


class _Made(NamedTuple):
    """Some of what a rank has made by itself, to be compared: of one group, its shape and text, its latents and its gradient."""

    key: tuple[Any, ...]
    latents: Tensor
    gradient: Tensor


def _update(trainer: Trainer) -> Iterator[Finding]:
    """Check one update of all ranks together against what single ranks make.

    Each team makes a group and all take the step. Then each rank makes its neighbor's group again, by itself, as one process would.
    """
    world, config, (number,) = trainer.world, trainer.config, trainer.own_groups
    start = [parameter.detach().clone() for parameter in trainer.parameters]
    judged = trainer.rollouts.judged(1, number)
    with judged.group as group:
        outcomes = trainer.everybodys([judged.outcome(number, config)])
        advantages = {outcome.number: outcome.advantages for outcome in outcomes}
        if not all(values.any() for values in advantages.values()):  # an update needs something to learn
            advantages = dict.fromkeys(advantages, torch.linspace(-1, 1, config.rollout.group_size, dtype=torch.float64))
        together = _made(judged.prompt.text, group)
        stepper = _look(trainer)
        with Updates(trainer.objective, stepper, world=world, team=trainer.team) as updates:
            updates.learn(number, group, advantages[number])
            updates.finish()
    step = _alike(world, "the step", trainer.checksum())
    with torch.no_grad():
        for parameter, before in zip(trainer.parameters, start):
            parameter.copy_(before)
    neighbor = (number + 1) % len(advantages)
    alone = _alone(trainer, neighbor, advantages[neighbor])
    yield from _compared(trainer, together._replace(gradient=stepper.gradient), neighbor, alone)
    yield step


def _alone(trainer: Trainer, number: int, advantages: Tensor) -> _Made:
    """Make a group and its gradient as one process does."""
    rollouts = Rollouts(trainer.config, trainer.generator, trainer.engine, trainer.objective, trainer.prompts, trainer.rewards)
    prompt, stepper = rollouts.prompt(1, number), _look(trainer)
    with rollouts.roll_out(rollouts.encode(prompt), 1, number) as group, Updates(trainer.objective, stepper) as updates:
        updates.learn(number, group, advantages)
        updates.finish()
        return _made(prompt.text, group)._replace(gradient=stepper.gradient)


def _look(trainer: Trainer) -> _Look:
    return _Look(torch.optim.AdamW(trainer.parameters, lr=trainer.config.optimizer.lr), eps=trainer.config.optimizer.eps)


def _made(text: str, group: Any) -> _Made:
    return _Made((text, group.pivot), _elements([group.tails]), torch.zeros(0))


def _compared(trainer: Trainer, together: _Made, neighbor: int, alone: _Made) -> Iterator[Finding]:
    """Compare what the ranks have made together with what each has made alone."""
    world, (own,) = trainer.world, trainer.own_groups
    shared: dict[int, _Made] = {}
    gradients: dict[int, Tensor] = {}
    for number, made, other, by_one in world.gathered((own, together, neighbor, alone)):
        shared.setdefault(number, made)
        gradients.setdefault(other, by_one.gradient)
    dtype = trainer.generator.model.dtype
    theirs, allowed = shared[neighbor], SAME_LATENTS.get(dtype, HALF)
    same = alone.key == theirs.key and _distance(alone.latents, theirs.latents) <= allowed
    differing = [rank for rank, equal in enumerate(world.gathered(same)) if not equal]
    detail = f"{_named(differing)} {_verb(differing, 'makes', 'make')} another than the rank whose it is, of the same key"
    yield Finding("a group", not differing, detail if differing else "the same on whatever rank it is made: prompt, pivot and latents")
    same_length = len({len(gradient) for gradient in gradients.values()}) == 1
    distances = world.gathered(_distance(together.gradient, torch.stack([*gradients.values()]).mean(0)) if same_length else float("inf"))
    far = [rank for rank, distance in enumerate(distances) if not distance <= SAME_GRADIENT.get(dtype, HALF)]
    if far:
        detail = f"that of {_named(far)} is not the mean over all groups, but {max(distances):.2g} of its size away: ranks learn apart"
    else:
        detail = f"that of one process on every rank, {_within(max(distances))}"
    yield Finding("the gradient of all", not far, detail)


def _within(distance: float) -> str:
    return "to the last digit" if distance < 1e-6 else f"within {distance:.1g} of its size"


def _elements(tensors: Iterable[Tensor]) -> Tensor:
    """Return some elements of each tensor, float64, on the CPU."""
    flats = [tensor.detach().flatten() for tensor in tensors]
    parts = [flat[:: max(1, flat.numel() // SAMPLES)].double().cpu() for flat in flats]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference over that of what is expected."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).norm() / expected.norm()).item()


def _named(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _verb(ranks: list[int], singular: str, plural: str) -> str:
    return plural if len(ranks) > 1 else singular
