"""Training on several ranks is training on one: the same groups, rewards and advantages, and the same adapter up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.ranks import run_ranks

from arcopo_fast import collect
from arcopo_fast.build import Generator, load_generator
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation import windows
from arcopo_fast.model.lora import adapter_state
from arcopo_fast.model.vae import StreamingDecoder
from arcopo_fast.runtime.distributed import World
from arcopo_fast.train import one_iteration
from arcopo_fast.training import trainer as training
from arcopo_fast.training.groups import JudgedGroup, Outcome
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer

ITERATIONS, GROUPS, GROUP = 5, 4, 4
SMALL = [
    "video.chunks=2",
    "sampler.steps=[1000, 350]",
    f"rollout.group_size={GROUP}",
    f"rollout.prompts_per_iteration={GROUPS}",
    "rollout.pivot=per_group",
    "objective.anchors_per_update=2",
    "objective.clip=1.0e-3",
    "lora.rank=4",
    f"train.iterations={ITERATIONS}",
]


def trained(world: World, *settings: str) -> dict[str, Any]:
    """Return all that a rank has seen and learned after all iterations."""
    trainer = Trainer(load_config("toy", [*SMALL, *settings]), world)
    watch, seen, source = LearningWatch(trainer.config), dict[tuple[int, int], Any](), trainer.groups.judged
    outcomes, records = dict[tuple[int, int], Any](), []

    def judged(iteration: int, index: int) -> JudgedGroup:
        made = source(iteration, index)
        seen[iteration, index] = (made.prompt.text, made.group.pivot, made.group.inputs[0].clone(), made.group.predictions.clone())
        return made

    everybodys = trainer.everybodys

    def gathered(own: Any) -> Any:
        found = everybodys(own)
        outcomes.update({(len(records), outcome.number): outcome for outcome in found})
        return found

    trainer.groups.judged, trainer.everybodys = judged, gathered  # type: ignore[method-assign]
    for iteration in range(1, trainer.config.train.iterations + 1):
        records.append(one_iteration(trainer, watch, iteration))
    assert trainer.engine.pool.pages_in_use == 0
    return {
        "seen": seen,
        "outcomes": outcomes,
        "records": [{name: value for name, value in record.items() if name != "time"} for record in records],
        "times": [record["time"] for record in records],
        "adapter": {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()},
        "steps": {int(state["step"]) for state in trainer.optimizer.state.values()},
        "spread": trainer.spread,
    }


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("buffers") / "groups")
    collect.main(["toy", *SMALL, "--buffer", path, "--groups", "7"])
    return path


@pytest.fixture(scope="module")
def alone(buffer: str) -> Callable[..., dict[str, Any]]:
    """One process's run, or its first iteration, in waves of so many branches."""

    @cache
    def made(mode: str, wave: int = GROUP, iterations: int = ITERATIONS) -> dict[str, Any]:
        waves = [f"rollout.branches_per_wave={wave}", f"rollout.decode_branches={wave}", f"train.iterations={iterations}"]
        return trained(World(), *settings_of(mode, buffer), *waves)

    return made


def settings_of(mode: str, buffer: str) -> list[str]:
    return [] if mode == "on_policy" else [f"train.mode={mode}", f"train.buffer={buffer}"]


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], part: str = "") -> float:
    """Relative, over all matrices, or those of a part."""
    ours, theirs = (torch.cat([value.flatten().double() for name, value in state.items() if part in name]) for state in (found, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("mode", ["on_policy", "semi_on_policy"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("spread", ["groups", "branches"])
def test_training_is_that_of_one_process(spread: str, ranks: int, mode: str, alone: Callable[..., dict[str, Any]], buffer: str) -> None:
    """Bit for bit where groups are spread: the same calls with the same shapes, and sums in float64.

    Where branches are, a rank makes fewer at once, and rounds as one process does that makes them in such waves: then groups are equal bit
    for bit while the adapters are, and everything is equal up to rounding to what one process does in one wave. That it is rounding and
    nothing else, the test in float64 shows.
    """
    expected = alone(mode)
    results = run_ranks(ranks, trained, *settings_of(mode, buffer), f"train.spread={spread}")
    for found in results:
        assert found["steps"] == {2 * ITERATIONS} == expected["steps"], "every rank takes every step once"
        assert found["records"] == results[0]["records"], "all ranks log the same"
        assert all(torch.equal(found["adapter"][name], tensor) for name, tensor in results[0]["adapter"].items())
        assert (found["spread"].ranks > 1) == (spread == "branches")
        assert all("reduce" in seconds for seconds in found["times"])
    seen = {key: value for found in results for key, value in found["seen"].items()}
    assert seen.keys() == expected["seen"].keys() and len(seen) == ITERATIONS * GROUPS
    assert all(seen[key][:2] == values[:2] and torch.equal(seen[key][2], values[2]) for key, values in expected["seen"].items())
    gap, of_b = (distance(results[0]["adapter"], expected["adapter"], part) for part in ("", "lora_B"))
    worst = [differences(results[0]["outcomes"], expected["outcomes"], part) for part in ("rewards", "advantages")]
    print(f"{spread}, {ranks} ranks, {mode}: adapters {gap:.2g}, B {of_b:.2g}, rewards {worst[0]:.2g}, advantages {worst[1]:.2g}")
    if spread == "groups":
        assert gap == 0 and worst == [0, 0] and results[0]["records"] == expected["records"]
        assert all(torch.equal(seen[key][3], values[3]) for key, values in expected["seen"].items())
    else:
        assert gap <= 1e-5 and worst[0] <= 1e-5 and worst[1] <= 1e-3
        in_waves = alone(mode, max(results[0]["spread"].branches(GROUP)), iterations=1)
        first = [key for key in seen if key[0] == 1]
        assert all(torch.equal(seen[key][3], in_waves["seen"][key][3]) for key in first)
        own = {key: value for key, value in results[0]["outcomes"].items() if key[0] == 0}
        assert [differences(own, in_waves["outcomes"], part) for part in ("rewards", "advantages")] == [0, 0]


def explored(world: World, *settings: str) -> dict[tuple[int, str], Any]:
    """Return a rank's group of which all chunks explore, and the adapter after learning from it."""
    trainer = Trainer(load_config("toy_sde_grpo", [*EXPLORING, *settings]), world)
    watch, made, source = LearningWatch(trainer.config), dict[tuple[int, str], Any](), trainer.groups.judged

    def judged(iteration: int, index: int) -> JudgedGroup:
        group = (judged := source(iteration, index)).group
        for chunk, states in group.explored.items():
            made[chunk, "inputs"], made[chunk, "predictions"] = states.inputs.clone(), states.predictions.clone()
        return judged

    trainer.groups.judged = judged  # type: ignore[method-assign]
    one_iteration(trainer, watch, 1)
    return made | {(-1, name): tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}


EXPLORING = [
    *("video.chunks=2", "objective.explore=all", "rollout.pivot=1", "lora.rank=4", "train.iterations=1"),
    *(f"rollout.group_size={GROUP}", "objective.anchors_per_update=2", "train.spread=branches"),
]


def test_branches_whose_chunks_all_explore() -> None:
    """Every rank has every chunk of all members, as one process makes them in waves of the same size."""
    alone = explored(World(), "rollout.branches_per_wave=2", "rollout.decode_branches=2")
    for found in run_ranks(2, explored):
        assert found.keys() == alone.keys() and {chunk for chunk, _ in found} == {-1, 0, 1}
        assert all(torch.equal(found[key], alone[key]) for key in found if key[0] >= 0)
        adapter, expected = (torch.cat([value.flatten() for key, value in state.items() if key[0] < 0]) for state in (found, alone))
        assert (adapter - expected).norm() <= 1e-5 * expected.norm()


def trained_in_float64(world: World, *settings: str) -> dict[str, Any]:
    """The same, but weights, adapters, frames and scores are all float64."""

    def load(*arguments: Any, **options: Any) -> Generator:
        generator = load_generator(*arguments, **options)
        generator.model.double()
        generator.decoder = StreamingDecoder(generator.decoder.vae.double(), generator.decoder.frames_per_call)
        return generator

    def score(rewards: dict[str, Any], frames: torch.Tensor, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        assert frames.dtype == torch.float64
        torch.set_default_dtype(torch.float64)
        try:
            return {name: reward(frames, prompts) for name, reward in rewards.items()}
        finally:
            torch.set_default_dtype(torch.float32)

    with patch.object(training, "load_generator", load), patch.object(windows, "score", score):
        return trained(world, *settings)


FEWER = ["train.iterations=2", "rollout.prompts_per_iteration=2"]


@pytest.fixture(scope="module")
def alone_in_float64() -> dict[str, Any]:
    return trained_in_float64(World(), *FEWER, f"rollout.branches_per_wave={GROUP}", f"rollout.decode_branches={GROUP}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_branches_on_ranks_differ_by_rounding_alone(ranks: int, alone_in_float64: dict[str, Any]) -> None:
    """In float64 the rewards, advantages and adapter are those of one process that makes all branches at once."""
    found = run_ranks(ranks, trained_in_float64, *FEWER, "train.spread=branches")[0]
    assert {tensor.dtype for tensor in found["adapter"].values()} == {torch.float64}
    worst = [differences(found["outcomes"], alone_in_float64["outcomes"], part) for part in ("rewards", "advantages")]
    gap = distance(found["adapter"], alone_in_float64["adapter"])
    print(f"branches, {ranks} ranks, float64: adapters {gap:.2g}, rewards {worst[0]:.2g}, advantages {worst[1]:.2g}")
    assert len({tuple(outcome.advantages.tolist()) for outcome in found["outcomes"].values()}) == len(found["outcomes"]) == 4
    assert max(worst) <= 1e-12 and gap <= 1e-12


def differences(found: dict[Any, Outcome], expected: dict[Any, Outcome], part: str) -> float:
    """The largest difference of rewards, or of advantages."""

    def values(outcome: Outcome) -> torch.Tensor:
        return torch.cat([*outcome.rewards.values()]).double() if part == "rewards" else outcome.advantages

    return max((values(outcome) - values(expected[key])).abs().max().item() for key, outcome in found.items())
