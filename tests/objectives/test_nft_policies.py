"""Astrolabe's policies and controllers: who acts, who is compared, which videos are held to the reference, and when that is renewed.

Acceptance tests 4 and 12 are here, see test_nft.py.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.adapted import GROUP, adapted_engine, fresh_engine
from support.models import SHAPE, random_text
from support.ranks import run_ranks
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.model.lora import adapter_parameters, adapter_state
from arcopo_fast.objectives.advantage import group_advantages
from arcopo_fast.objectives.nft import AVERAGE, REFERENCE, NFTObjective, NFTSettings, old_decay
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.selective import Renewal, Selection, ascending_ranks, disagreement
from arcopo_fast.objectives.updates import Updates
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, keyed_rng
from arcopo_fast.runtime.distributed import World
from arcopo_fast.training.groups import Rollouts

WEIGHTS = {"main": 1.0, "other": 1.0}
SELECTIVE = {"kl": "selective", "kl_weight": 0.5}


def objective_of(engine: Engine, **settings: object) -> NFTObjective:
    return NFTObjective(engine, NFTSettings.model_validate(settings))


def rewards_of(number: int, iteration: int = 0) -> dict[str, Tensor]:
    drawn = keyed_rng("rewards", iteration, number).standard_normal((2, GROUP))
    return {name: torch.from_numpy(row) for name, row in zip(WEIGHTS, drawn)}


def iterate(objective: NFTObjective, stepper: Stepper, iteration: int, groups: int, world: World | None = None) -> dict[str, float]:
    """One iteration as a run does it, of the groups of one rank."""
    world, pivot = world or World(), 1 + iteration % 2
    with Updates(objective, stepper, world=world) as updates:
        for number in range(world.rank, groups, world.size):
            text = torch.from_numpy(keyed_rng("text", number).standard_normal((1, 5, 10), dtype=np.float32))
            with objective.policies.as_(objective.acting):
                group = objective.engine.rollout(
                    text, GroupId(3, iteration, number), pivot=pivot, members=GROUP, plan=objective.noise_plan(0.5)
                )
            rewards = rewards_of(number, iteration)
            updates.learn(number, group, group_advantages(rewards, WEIGHTS), rewards)
            group.put_away()
        return updates.finish()


def trained(objective: NFTObjective, iterations: range, *, groups: int = 2, stepper: Stepper | None = None) -> list[dict[str, float]]:
    stepper = stepper or Stepper(torch.optim.AdamW(adapter_parameters(objective.engine.model), lr=1e-3))
    return [iterate(objective, stepper, iteration, groups) for iteration in iterations]


def weights_of(objective: NFTObjective) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(objective.engine.model).items()}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


# 4: selective regularization


def test_4_the_mask_finds_planted_hacks() -> None:
    """Videos whose primary reward is inflated and whose others are poor, among videos whose rewards agree."""
    for _ in range(5):
        quality = torch.randn(240, dtype=torch.float64)
        scores = {name: quality + 0.5 * torch.randn(240, dtype=torch.float64) for name in ("main", "b", "c")}
        hacked = torch.randperm(240)[:12]
        scores["main"][hacked] += 5
        scores["b"][hacked] -= 5
        scores["c"][hacked] -= 5
        found = Selection().mask(disagreement(scores, "main"))
        assert 6 <= found.sum() <= 18 and found[hacked].sum() > 0.9 * found.sum()
        descending = {name: -values for name, values in scores.items()}
        assert not Selection().mask(disagreement(descending, "main"))[hacked].any(), "the released code's order finds none"


def test_4_ranks_ties_and_missing_scores() -> None:
    assert ascending_ranks(torch.tensor([0.3, -1.0, 0.3, 2.0])).tolist() == [2.5, 1, 2.5, 4]
    scores = {"main": torch.tensor([3.0, 1.0, float("nan"), 2.0]), "other": torch.tensor([1.0, 2.0, 9.0, 3.0])}
    delta = disagreement(scores, "main")
    assert delta[[0, 1, 3]].tolist() == [2, -1, -1] and delta[2].isnan()
    assert Selection().mask(delta).tolist() == [False] * 4, "of one positive none lies above the quantile"


@pytest.mark.parametrize("delta", [[], [float("nan")] * 3], ids=["no video", "no score"])
def test_4_without_positives_nothing_is_held(delta: list[float]) -> None:
    selection, values = Selection(), torch.tensor(delta, dtype=torch.float64)
    assert not selection.mask(values).any()
    selection.follow(values)
    assert selection == Selection()


def test_4_the_share_follows_the_disagreement_within_its_bounds() -> None:
    selection, shares = Selection(), []
    for mean in [1.0, *range(2, 12), 5.5, *(-np.arange(1.0, 30.0) / 1000 + 0.9)]:
        selection.follow(torch.tensor([mean, -7.0], dtype=torch.float64))
        shares.append(selection.rho)
    assert shares[0] == 0.1 and shares[1] == pytest.approx(0.11) and max(shares[:11]) == shares[10] == 0.2
    assert shares[11] == shares[10], "neither the most nor the least of the recent ones"
    assert shares[12] == pytest.approx(0.18) and min(shares) == shares[-1] == 0.02 and len(selection.recent) == 20


def test_4_the_distance_is_a_mean_over_the_held_videos_of_all_groups() -> None:
    """The gradient is that without it, plus kl_weight times that of the mean over held members; the reference is asked for them alone."""
    gradients = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(5)
        engine = adapted_engine(torch.float64)
        objective = objective_of(engine, kl="selective", kl_weight=weight, kl_tau=9.0, micro_batch=2)
        parameters = adapter_parameters(engine.model)
        objective.begin()
        for name in (REFERENCE, "then"):
            objective.policies.keep(name)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
        kept: list[Tensor] = []
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_pre_hook(lambda *_, kept=kept, of=parameters: kept.extend(parameter.grad.clone() for parameter in of))
        statistics = iterate(objective, Stepper(optimizer), 2, groups=3)
        gradients[weight] = kept
    scores = {name: torch.cat([rewards_of(number, 2)[name] for number in range(3)]) for name in WEIGHTS}
    held = Selection().mask(disagreement(scores, "main")).view(3, GROUP)
    assert 0 < held.sum() < GROUP and statistics["update1/held"] == pytest.approx(held.double().mean().item())
    distances, sums = list[float](), [torch.zeros_like(parameter) for parameter in parameters]
    for number in range(3):
        if not held[number].any():
            continue
        text = torch.from_numpy(keyed_rng("text", number).standard_normal((1, 5, 10), dtype=np.float32))
        with objective.policies.as_("then"):
            group = engine.rollout(text, GroupId(3, 2, number), pivot=1, members=GROUP, plan=objective.noise_plan(0.5))
        for part in objective.samples(group, 0):
            for row in held[number].nonzero().flatten().tolist():
                own = group.videos()[row : row + 1, : sum(SHAPE.chunk_frames[: part.chunk])]
                with objective.policies.as_("then"), torch.no_grad():
                    context = engine.rebuild_prefix(group.text, own)
                with objective.policies.as_(REFERENCE), torch.no_grad():
                    reference = engine.predict(group, part.part(slice(row, row + 1)), context=context)
                distance = (engine.predict(group, part.part(slice(row, row + 1)), context=context) - reference).square().mean()
                distances.append(distance.item())
                for total, gradient in zip(sums, torch.autograd.grad(distance, parameters)):
                    total += gradient
                context.cache.release()
        group.release()
    assert statistics["update1/kl"] == pytest.approx(sum(distances) / len(distances), rel=1e-6)
    for with_it, without, total in zip(gradients[0.5], gradients[0.0], sums, strict=True):  # of the adapter, which is float32
        added = with_it - without
        assert (added - 0.5 * total / len(distances)).norm() <= 1e-4 * added.norm() > 0


def asked(objective: NFTObjective, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The policies that predict without gradient from now on, pass by pass."""
    names: list[str] = []
    known = objective.engine.predict

    def predict(*given: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            names.append("compared")
        return known(*given, **named)

    monkeypatch.setattr(objective.engine, "predict", predict)
    return names


def test_passes_that_are_not_needed_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old policy's while it is the live one, bit for bit; the reference's of micro-batches in which no video is held to it."""
    objective = objective_of(adapted_engine(), micro_batch=1, **SELECTIVE)
    passes = asked(objective, monkeypatch)
    iterate(objective, Stepper(torch.optim.SGD(adapter_parameters(objective.engine.model), lr=0.1)), 1, groups=1)
    assert not passes, "at first all three are the same"
    record = iterate(objective, Stepper(torch.optim.SGD(adapter_parameters(objective.engine.model), lr=0.1)), 2, groups=1)
    members = GROUP * (SHAPE.chunks - 1)  # the old policy is another one now, for all of them
    assert 0 < record["update1/held"] < 1 and len(passes) == members + round(record["update1/held"] * members)
    passes.clear()
    monkeypatch.setattr(Selection, "mask", lambda self, delta: torch.zeros_like(delta, dtype=torch.bool))
    iterate(objective, Stepper(torch.optim.SGD(adapter_parameters(objective.engine.model), lr=0.1)), 4, groups=1)
    assert len(passes) == members and "update1/kl" in record


def together(world: World, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, float]]]:
    torch.manual_seed(11)
    objective = objective_of(fresh_engine(), kl_max_age=1, evaluation_ema=0.9, **settings)
    stepper = Stepper(torch.optim.AdamW(adapter_parameters(objective.engine.model), lr=1e-3), eps=1e-8)
    records = [iterate(objective, stepper, iteration, 2, world) for iteration in range(2)]
    return weights_of(objective), objective.state_dict(), records


def test_4_on_two_ranks_everything_is_as_on_one() -> None:
    """Masks, means, controllers, policies and the adapter, bit for bit."""
    weights, state, records = together(World(), SELECTIVE)
    assert any(record["reference_reset"] for record in records) and any(0 < record["update1/held"] < 0.2 for record in records)
    for found in run_ranks(2, together, SELECTIVE):
        assert same(found[0], weights) and same(found[1], state) and found[2] == records


# 12: schedules, and going on


def test_12_the_old_policy_by_a_table() -> None:
    ramp = NFTSettings(old="ramp")
    assert [old_decay(ramp, moves) for moves in (0, 1, 100, 499, 500, 9000)] == pytest.approx([0, 0.001, 0.1, 0.499, 0.5, 0.5])
    assert [old_decay(NFTSettings(), moves) for moves in (0, 7)] == [0.9, 0.9]
    assert [old_decay(NFTSettings(old="sync"), moves) for moves in (0, 7)] == [0, 0]


@pytest.mark.parametrize("old", ["ema", "ramp", "sync"])
def test_12_policies_move_as_the_table_says(old: str) -> None:
    objective = objective_of(fresh_engine(), old=old, old_ramp=0.2, evaluation_ema=0.3)
    start, expected, average, records = weights_of(objective), weights_of(objective), weights_of(objective), []
    stepper = Stepper(torch.optim.AdamW(adapter_parameters(objective.engine.model), lr=1e-3))
    for moves, factor in enumerate({"ema": (0.9,) * 2, "ramp": (0.0, 0.2, 0.4, 0.5), "sync": (0.0,) * 2}[old]):
        records.append(iterate(objective, stepper, moves, 1))
        live, slow = weights_of(objective), (0.1, 2 / 11, 0.25, 0.3)[moves]
        expected = {name: factor * tensor + (1 - factor) * live[name] for name, tensor in expected.items()}
        average = {name: slow * tensor + (1 - slow) * live[name] for name, tensor in average.items()}
        assert records[-1]["old_decay"] == pytest.approx(factor)
        for name, tensor in objective.policies.state_dict()["old"].items():
            torch.testing.assert_close(tensor, expected[name])
            torch.testing.assert_close(objective.policies.state_dict()[AVERAGE][name], average[name])
    assert not same(start, weights_of(objective)) and (old == "sync") == objective.policies.is_live("old")
    assert objective.evaluated == AVERAGE and objective.acting == "old" and REFERENCE not in objective.policies


def test_12_the_reference_is_renewed_by_distance_or_age() -> None:
    renewal, renewed, taus = Renewal(), [], []
    distances = [0.0] * 16 + [0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.0]
    for iteration, distance in enumerate(distances):
        if renewal.due(distance, max_age=15):
            renewed.append(iteration)
        taus.append(renewal.tau)
    assert renewed == [15, 16, 22], "too old, too far at once, too far later"
    assert taus[14:17] == pytest.approx([0.15, 0.14, 0.15]) and taus[-1] == pytest.approx(0.15)
    for _ in range(40):
        renewal.due(1.0, max_age=15)
    assert renewal.tau == pytest.approx(0.2)
    for _ in range(400):
        renewal.due(0.0, max_age=15)
    assert renewal.tau == pytest.approx(0.1)


def test_12_the_reference_is_a_copy_of_the_policy_as_it_was() -> None:
    objective = objective_of(fresh_engine(), kl="uniform", kl_weight=0.5, kl_max_age=2)
    start, stepper = weights_of(objective), Stepper(torch.optim.AdamW(adapter_parameters(objective.engine.model), lr=1e-3))
    for iteration in range(3):
        record = iterate(objective, stepper, iteration, 1)
        renewed = iteration == 2
        assert same(objective.policies.state_dict()[REFERENCE], weights_of(objective) if renewed else start)
        assert record["reference_reset"] == renewed and record["update1/kl"] > 0 or iteration == 0
    base = objective_of(fresh_engine(), kl="uniform", kl_weight=0.5, kl_reference="base")
    trained(base, range(2), groups=1)
    assert base.compared() == ("old", "reference") and REFERENCE not in base.policies


def test_12_a_run_that_goes_on_is_the_run_that_was_never_stopped() -> None:
    """Draws have names and no state; policies and controllers are saved, and adapters and records are equal bit for bit."""
    settings = {**SELECTIVE, "kl_max_age": 1, "evaluation_ema": 0.9, "old": "ramp"}
    whole = objective_of(fresh_engine(), **settings)
    parameters = adapter_parameters(whole.engine.model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    stepper = Stepper(optimizer, relative_clip=1.5)
    trained(whole, range(2), stepper=stepper)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), [parameter.detach() for parameter in parameters]))
    expected = trained(whole, range(2, 4), stepper=stepper)
    weights, state = weights_of(whole), copy.deepcopy(whole.state_dict())

    again = objective_of(whole.engine, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter, value in zip(parameters, saved[2]):
            parameter.copy_(value)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert trained(again, range(2, 4), stepper=stepper) == expected
    assert same(weights_of(again), weights) and same(again.state_dict(), state) and again.moves == 4


# Who acts


def test_the_old_policy_makes_the_groups() -> None:
    objective = objective_of(adapted_engine())
    engine, text, prompts = objective.engine, random_text(), SimpleNamespace(training=[Prompt("a prompt")])
    config = load_config("self_forcing_astrolabe", [f"rollout.group_size={GROUP}", "rollout.pivot=2", "rollout.branches_per_wave=null"])
    rollouts = Rollouts(config, SimpleNamespace(), engine, objective, prompts, {})  # type: ignore[arg-type]
    assert objective.acting == "live"
    with rollouts.roll_out(text, 1, 0) as first:
        objective.begin()
        with torch.no_grad():
            for parameter in adapter_parameters(engine.model):
                parameter.add_(0.1 * torch.randn_like(parameter))
        live = weights_of(objective)
        with rollouts.roll_out(text, 1, 0) as second, rollouts.roll_out(text, 1, 0, every_step=True) as whole:
            assert torch.equal(first.tails, second.tails) and not second.explored and list(whole.explored) == [1, 2, 3]
        objective.policies.keep("old")
        with rollouts.roll_out(text, 1, 0) as third:
            assert not torch.equal(third.tails, second.tails)
    assert same(live, weights_of(objective)) and objective.maker == "old"


def test_the_first_update_waits_for_the_last_group_only_where_ranks_are_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def noting(owner: type, name: str) -> None:
        known = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (happened.append(name), known(*given))[1])

    noting(Updates, "_learn")
    noting(Group, "put_away")
    for settings, waits in ((SELECTIVE, True), ({"kl": "uniform"}, False), ({"kl": "selective", "kl_weight": 0.0}, False)):
        objective = objective_of(fresh_engine(), **settings)
        iterate(objective, Stepper(torch.optim.SGD(adapter_parameters(objective.engine.model), lr=0.1)), 1, groups=2)
        expected = ["put_away"] * 2 + ["_learn", "put_away"] * 2 if waits else ["_learn", "put_away"] * 2
        assert objective.waits == waits and happened == expected
        happened.clear()
