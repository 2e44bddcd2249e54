"""SDE-GRPO on a small generator: what members share, the ratio and its gradient, against formulas written out independently."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from support import adapted
from support.adapted import GROUP, adapted_engine
from support.models import SHAPE, random_text
from torch import Tensor
from torch.distributions import Normal

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.sections import SamplerConfig
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_parameters
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.ratio import Items
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective, SdeGrpoSettings, log_probability_ratio
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan, NoiseSource
from arcopo_fast.rollout.sampler import Trajectory, Transition
from arcopo_fast.rollout.stream import Stream
from arcopo_fast.training.groups import JudgedGroup

PIVOT = 2
KERNELS = ["consistency", "dance_sde", "flow_sde", "flow_cps"]


def settings_of(kernel: str = "consistency", **more: Any) -> SdeGrpoSettings:
    return SdeGrpoSettings(**{"kernel": kernel, "steps": "all", **more})


def make_group(objective: SdeGrpoObjective, pivot: int = PIVOT) -> Group:
    return adapted.make_group(objective.engine, pivot, objective.noise_plan(0.5))


def gaussian(group: Group, step: int, clean: Tensor, x: Tensor) -> Normal:
    """Of the next state after one step, by the table of ALGORITHM.md 4 (whose formulas tests/rollout/test_sampler.py checks), float64."""
    transition = group.rule.transition(group.steps.sigmas[step], group.steps.next_sigma(step))
    return Normal(transition.mean(x.double(), clean.double()), transition.std)


def log_probabilities(objective: SdeGrpoObjective, group: Group) -> Tensor:
    """Of every member's transitions under the present weights, [noisy steps, G] float64, with gradient."""
    rows = []
    for step in range(len(group.steps) - 1):
        clean = objective.engine.predict(group, group.samples(torch.full((GROUP,), step), torch.arange(GROUP)))
        rows.append(gaussian(group, step, clean, group.inputs[step]).log_prob(group.inputs[step + 1].double()).flatten(1).mean(1))
    return torch.stack(rows)


class Recorder(torch.optim.SGD):
    """Keeps every gradient, and moves as SGD does."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients.append([parameter.grad.clone() for group in self.param_groups for parameter in group["params"]])
        super().step(closure)


def update(objective: SdeGrpoObjective, group: Group, advantages: Tensor, lr: float = 0.1) -> tuple[dict[str, float], Recorder]:
    parameters = adapter_parameters(objective.engine.model)
    optimizer = Recorder(parameters, lr)
    return objective.update([(group, advantages)], Stepper(optimizer, gradient_clip=1e9)), optimizer


# The group -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_noise", ["shared", "fresh"])
@pytest.mark.parametrize("kernel", ["consistency", "flow_sde"])
def test_what_members_share(kernel: str, init_noise: str) -> None:
    objective = SdeGrpoObjective(adapted_engine(), settings_of(kernel, init_noise=init_noise))
    engine, seen = objective.engine, []
    extend = engine.extend

    def watched(stream: Stream, chunk: int, initial: Tensor, noise: NoiseSource, **more: Any) -> Trajectory:
        fresh = [noise.renoise(chunk, step) for step in range(len(engine.steps_of(chunk)) - 1)]
        seen.append((chunk, initial, fresh))
        return extend(stream, chunk, initial, noise, **more)

    engine.extend = watched  # type: ignore[method-assign]
    with make_group(objective) as group:
        shared = KeyedNoise(SHAPE, group.id)
        assert [chunk for chunk, *_ in seen] == list(range(SHAPE.chunks))
        for chunk, initial, fresh in seen:
            same_start, own = shared.initial(chunk), chunk == PIVOT
            if own and init_noise == "fresh":
                assert distinct(initial)
            else:
                assert torch.equal(initial, same_start.expand_as(initial))
            for step, draw in enumerate(fresh):
                assert distinct(draw) and len(draw) == GROUP if own else torch.equal(draw, shared.renoise(chunk, step))
        assert distinct(group.inputs[0]) == (init_noise == "fresh")
        for step in range(1, len(group.steps)):
            assert distinct(group.inputs[step])
        before = sum(SHAPE.chunk_frames[:PIVOT])
        assert group.prefix_latents.shape[:2] == (1, before) and group.tails.shape[:2] == (GROUP, SHAPE.frames - before)
        assert distinct(group.tails[:, : SHAPE.chunk_frames[PIVOT]])


def distinct(members: Tensor) -> bool:
    """Are all of them different? Neither nearly equal, as rounding makes them, nor in part."""
    flat = members.double().flatten(1)
    distances = torch.pdist(flat)
    assert (distances == 0).all() or (distances > 1e-3 * flat.norm(dim=1).mean()).all()
    return bool((distances > 0).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_rollout_draws_from_its_kernel(kernel: str) -> None:
    """(x' - mean) / std of all transitions is standard normal, and independent between members, steps and elements."""
    objective = SdeGrpoObjective(adapted_engine(), settings_of(kernel))
    residuals = []
    with make_group(objective) as group:
        for step in range(len(group.steps) - 1):
            states = gaussian(group, step, group.predictions[step], group.inputs[step])
            residuals.append((group.inputs[step + 1] - states.mean) / states.stddev)
        assert torch.equal(group.tails[:, : SHAPE.chunk_frames[PIVOT]], group.predictions[-1]), "the last step draws nothing"
    drawn = torch.cat(residuals).flatten(1)  # [steps * G, D]
    assert abs(drawn.mean().item()) < 6 / drawn.numel() ** 0.5
    assert abs(drawn.square().mean().item() - 1) < 6 * (2 / drawn.numel()) ** 0.5
    products = drawn @ drawn.T / drawn.shape[1] ** 0.5
    assert (products - products.diag().diag()).abs().max() < 7


def test_the_prefix_is_that_of_every_other_objective() -> None:
    """The same key gives the same prompt's prefix and the same noise after the pivot: objectives are compared on the same rollouts."""
    engine, text = adapted_engine(), random_text()
    noise = KeyedNoise(SHAPE, GroupId(seed=int(torch.randint(10**6, ()))))
    rule = SdeGrpoObjective(engine, settings_of("flow_sde")).rule
    with (
        engine.rollout(text, noise.id, pivot=PIVOT, members=2, plan=NoisePlan(0.5)) as neighbours,
        engine.rollout(text, noise.id, pivot=PIVOT, members=2, plan=NoisePlan(0.0, rule)) as transitions,
    ):
        assert torch.equal(transitions.prefix_latents, neighbours.prefix_latents)
        assert torch.equal(transitions.inputs[0][0], noise.initial(PIVOT)[0])


@pytest.mark.parametrize("init_noise", ["shared", "fresh"])
@pytest.mark.parametrize("kernel", ["consistency", "flow_cps"])
def test_waves_draw_the_same(kernel: str, init_noise: str) -> None:
    objective = SdeGrpoObjective(adapted_engine(), settings_of(kernel, init_noise=init_noise))
    text, seed = random_text(), int(torch.randint(10**6, ()))
    name, plan = GroupId(seed), objective.noise_plan(0.5)
    groups = []
    for size in (None, 2, 4):  # all at once; even waves; a smaller last one
        with objective.engine.rollout(text, name, pivot=PIVOT, members=GROUP, plan=plan, branches_per_wave=size) as group:
            groups.append(group)
    for group in groups[1:]:
        torch.testing.assert_close(group.inputs, groups[0].inputs, rtol=0, atol=1e-4)
        torch.testing.assert_close(group.tails, groups[0].tails, rtol=0, atol=1e-4)


# The ratio -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pivot", [0, SHAPE.chunks - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_ratio_is_exactly_one_before_the_first_update(kernel: str, dtype: torch.dtype, pivot: int) -> None:
    engine = adapted_engine(dtype)
    for init_noise, micro_batch, explore in (("shared", None, "pivot"), ("fresh", 3, "pivot"), ("fresh", 3, "all")):
        objective = SdeGrpoObjective(engine, settings_of(kernel, init_noise=init_noise, micro_batch=micro_batch, explore=explore))
        with make_group(objective, pivot=pivot) as group:
            statistics, _ = update(objective, group, zscore(torch.randn(GROUP)))
        assert statistics["update1/ratio_max"] == statistics["update1/ratio_std"] == statistics["update1/outside_clip"] == 0
        assert statistics["update1/live"] == 1
        assert statistics["update2/ratio_max"] > 0, "after one update the ratio of fresh members has moved"
        assert engine.pool.pages_in_use == 0


def test_log_probability_ratio_is_that_of_the_normal_distribution() -> None:
    reached, mean, old_mean = torch.randn(3, 7, 2, 3, 4)
    std = 0.1 + torch.rand(7)
    wide = std.double().view(-1, 1, 1, 1)
    expected = (Normal(mean.double(), wide).log_prob(reached.double()) - Normal(old_mean.double(), wide).log_prob(reached.double())).mean(
        (1, 2, 3)
    )
    torch.testing.assert_close(log_probability_ratio(reached, mean, old_mean, std), expected, rtol=1e-12, atol=1e-12)


def test_a_tiny_ratio_keeps_its_digits() -> None:
    """Means that differ by one part in a million, against exact rational arithmetic; the difference of two log-probabilities is far off."""
    old_mean = torch.randn(5, 40)
    mean = old_mean * (1 + 1e-6 * torch.randn(5, 40))
    std = 0.05 + torch.rand(5)
    reached = old_mean + std[:, None] * torch.randn(5, 40)
    exact = []
    for row in range(5):
        new, old = (
            sum((Fraction(x) - Fraction(m)) ** 2 for x, m in zip(reached[row].tolist(), means[row].tolist())) for means in (mean, old_mean)
        )
        exact.append(float((old - new) / (2 * Fraction(std[row].item()) ** 2 * 40)))
    expected = torch.tensor(exact, dtype=torch.float64)
    scale = expected.abs().max()
    error = (log_probability_ratio(reached, mean, old_mean, std) - expected).abs().max() / scale
    naive = (Normal(mean, std[:, None]).log_prob(reached).mean(1) - Normal(old_mean, std[:, None]).log_prob(reached).mean(1)).double()
    assert 0 < scale < 1e-3
    assert error < 1e-12 < 1e-4 < (naive - expected).abs().max() / scale


def test_gradient_of_the_ratio() -> None:
    reached, old_mean = torch.randn(2, 4, 3, 5)
    mean = (old_mean + 0.1 * torch.randn(4, 3, 5)).double().requires_grad_()
    std = 0.1 + torch.rand(4)
    weight = torch.randn(4, dtype=torch.float64)
    naive = Normal(mean, std.double().view(-1, 1, 1)).log_prob(reached.double()).mean((1, 2))
    (expected,) = torch.autograd.grad((weight * naive).sum(), mean)
    (gradient,) = torch.autograd.grad((weight * log_probability_ratio(reached, mean, old_mean, std)).sum(), mean)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


# The update ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_first_gradient_is_that_of_the_weighted_log_probabilities(kernel: str) -> None:
    """-mean over the drawn (member, step) pairs of A d log p: the ratio is 1 there, and nothing is clipped.

    A float64 model: the terms cancel to as little as a sixth of their norms, and a mean of "dance_sde" near sigma = 0 enlarges what the
    model rounds. What is left is what float32 adapters keep of their gradients.
    """
    engine = adapted_engine(torch.float64)
    objective = SdeGrpoObjective(engine, settings_of(kernel, updates=1, anchors_per_update=4, micro_batch=3))
    advantages = zscore(torch.randn(GROUP))
    with make_group(objective) as group:
        steps, anchors = objective.draw_items(group, 0)
        assert len(steps) == 4 * (len(group.steps) - 1)
        loss = -(advantages[anchors] * log_probabilities(objective, group)[steps, anchors]).mean()
        expected = torch.autograd.grad(loss, adapter_parameters(objective.engine.model))
        _, optimizer = update(objective, group, advantages)
    (gradients,) = optimizer.gradients
    ours, theirs = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (gradients, expected))
    assert theirs.norm() > 0 and (ours - theirs).norm() < 3e-6 * theirs.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_updates_make_good_transitions_likelier(kernel: str) -> None:
    objective = SdeGrpoObjective(adapted_engine(), settings_of(kernel, clip=None, updates=4, anchors_per_update=GROUP))
    advantages = zscore(torch.randn(GROUP))
    with make_group(objective) as group, torch.no_grad():
        before = log_probabilities(objective, group)
        with torch.enable_grad():
            update(objective, group, advantages, lr=1e-2)
        change = log_probabilities(objective, group) - before
    assert (change * advantages).mean() > 0
    assert change[:, advantages > 0].mean() > change[:, advantages < 0].mean()


@pytest.mark.parametrize("clip", [1e-3, None])
def test_loss_clip_and_live_are_those_of_the_formula(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = SdeGrpoObjective(adapted_engine(), settings_of("flow_sde", clip=clip))
    advantages = torch.tensor([1.5, -0.7, 0.0, 0.4, -2.0, 0.8], dtype=torch.float64)
    with make_group(objective) as group:
        items = Items(*torch.cartesian_prod(torch.arange(len(group.steps) - 1), torch.arange(GROUP)).unbind(1))
        pairs = list(zip(items.steps.tolist(), items.anchors.tolist()))
        samples = group.samples(*items)
        transition = group.rule.transitions(group.steps, items.steps, dim=5)
        old_clean = objective.engine.predict(group, samples).detach()
        old = transition.mean(samples.x, old_clean)  # means of the next state
        # Along the drawn noise: ratios of either sign, inside the clip and beyond it.
        std = torch.tensor([group.rule.transition(group.steps.sigmas[step], group.steps.next_sigma(step)).std for step, _ in pairs])
        wanted = torch.tensor([3e-3, 3e-4, -3e-4, -3e-3]).repeat(len(pairs))[: len(pairs)]
        reached = group.inputs[items.steps + 1, items.anchors]
        shift = (wanted * std**2 / (reached - old).square().flatten(1).mean(1)).view(-1, 1, 1, 1, 1)
        new = (old + shift * (reached - old)).requires_grad_()
        monkeypatch.setattr(Transition, "mean", lambda self, x, clean: clean)  # what is compared are the means themselves
        outcome = objective.ratio(group, objective.target(group, advantages), samples, new, old)
        monkeypatch.undo()
        (gradient,) = torch.autograd.grad(outcome.loss.sum(), new)

        live = []
        for row, (_, member) in enumerate(pairs):
            mean = new[row].detach().double().requires_grad_()
            new_policy, old_policy = (Normal(center, std[row].double()) for center in (mean, old[row].double()))
            rho = (new_policy.log_prob(reached[row].double()) - old_policy.log_prob(reached[row].double())).mean().exp()
            clipped = rho if clip is None else rho.clamp(1 - clip, 1 + clip)
            loss = -min(rho * advantages[member], clipped * advantages[member])
            (expected,) = torch.autograd.grad(loss, mean)
            assert outcome.ratio_minus_one[row, 0].item() == pytest.approx(rho.item() - 1, abs=1e-8)
            assert outcome.loss[row].item() == pytest.approx(loss.item(), abs=1e-8)
            torch.testing.assert_close(gradient[row].double(), expected, rtol=1e-4, atol=1e-9)
            if advantages[member] != 0:
                live.append(bool(expected.any()))
        assert outcome.live.flatten().tolist() == live
        assert all(live) == (clip is None) and any(live)


def test_one_pair_at_a_time_reports_the_same_statistics() -> None:
    """Also the spread of the ratios, which no single one has, and where a single pair, of advantage 0, is drawn."""
    statistics = []
    engine = adapted_engine()
    start = [parameter.detach().clone() for parameter in adapter_parameters(engine.model)]
    with make_group(SdeGrpoObjective(engine, settings_of())) as group:
        advantages = zscore(torch.randn(GROUP))
        for size in (None, 1):
            for parameter, value in zip(adapter_parameters(engine.model), start):
                parameter.data.copy_(value)
            statistics.append(update(SdeGrpoObjective(engine, settings_of(micro_batch=size)), group, advantages)[0])
        for name, value in statistics[0].items():
            assert statistics[1][name] == pytest.approx(value, rel=1e-3, abs=1e-9), name
        assert statistics[0]["update2/ratio_std"] > 0
        objective = SdeGrpoObjective(engine, settings_of(anchors_per_update=1, updates=1, steps=0.5))
        drawn = objective.draw_items(group, 0).anchors[0]
        advantages = torch.where(torch.arange(GROUP) == drawn, 0.0, 1.0)
        said, _ = update(objective, group, advantages)
        assert "update1/live" not in said and all(value == value for value in said.values())


# Settings --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [{"steps": [1000]}, {"steps": [1000, 500], "first_chunk_steps": [1000]}])
def test_a_sampler_of_one_step_is_refused(steps: dict[str, Any]) -> None:
    sampler = SamplerConfig(**steps, warp=True, shift=5.0)
    with pytest.raises(UserError, match="objective.kind=copo"):
        SdeGrpoObjective(adapted_engine(sampler=sampler), settings_of())


def test_kernels_have_the_noise_of_their_papers() -> None:
    engine = adapted_engine()
    noise = {kernel: SdeGrpoObjective(engine, settings_of(kernel)).rule.noise for kernel in KERNELS[1:]}
    assert noise == {"dance_sde": 0.3, "flow_sde": 0.7, "flow_cps": 0.7}
    assert SdeGrpoObjective(engine, settings_of("flow_sde", kernel_noise=0.4)).rule.noise == 0.4


def test_only_steps_with_noise_are_drawn() -> None:
    objective = SdeGrpoObjective(adapted_engine(), settings_of(skip_last_step=True))
    with make_group(objective) as group:
        noisy = set(range(len(group.steps) - 1))
        assert set(objective.draw_items(group, 0).steps.tolist()) == noisy, "the last step, which has no noise, is the one that is skipped"
        objective.settings = settings_of(steps=0.5)
        drawn = {tuple(sorted(objective.draw_items(group, count).steps.unique().tolist())) for count in range(8)}
        assert set().union(*drawn) == noisy


@pytest.mark.parametrize("given", [{"kernel": "flow_cps", "kernel_noise": 1.2}, {"kernel": "consistency", "kernel_noise": 0.5}])
def test_noise_that_a_kernel_cannot_have_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="objective.kernel_noise") as error:
        load_config("toy_sde_grpo", [f"objective.{name}={value}" for name, value in given.items()])
    assert "\n" not in str(error.value)


def test_advantages_are_cut() -> None:
    assert SdeGrpoSettings().advantage_max == 5
    rewards = {"toy_vq": torch.randn(64).cauchy_()}
    for largest in (1.0, None):
        config = load_config("toy_sde_grpo", [f"objective.advantage_max={largest or 'null'}", "rewards={toy_vq: 1.0}"])
        advantages = JudgedGroup(None, Prompt(""), rewards).advantages(config)  # type: ignore[arg-type]
        uncut = zscore(rewards["toy_vq"], config.objective.advantage_std_floor)
        assert uncut.abs().max() > 1
        torch.testing.assert_close(advantages, uncut if largest is None else uncut.clamp(-1, 1))


# Recipes ---------------------------------------------------------------------------------------------------------------------------


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize(
    ("recipe", "may_differ"),
    [
        ("toy_sde_grpo", set()),
        ("toy_neighbor_grpo", {"video.chunks", "video.chunk_frames", "sampler.kind", "sampler.steps", "sampler.warp", "sampler.shift"}),
    ],
)
def test_recipes_of_baselines_differ_from_the_toy_only_in_their_method(recipe: str, may_differ: set[str]) -> None:
    """The same generator, rewards and evaluation: what is compared is the objective. Rate and norm limit suit the scale of its loss."""
    ours, toy = (leaves(load_config(name).model_dump()) for name in (recipe, "toy"))
    different = {name for name in ours.keys() | toy.keys() if ours.get(name, "absent") != toy.get(name, "absent")}
    of_no_objective = {name for name in different if not name.startswith("objective.")}
    assert of_no_objective == {"name", "optimizer.lr", "optimizer.gradient_clip"} | may_differ
    assert ours["video.chunks"] * ours["video.chunk_frames"] == toy["video.chunks"] * toy["video.chunk_frames"]
