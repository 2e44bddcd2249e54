"""One iteration's updates over two groups against the equations of AR-CoPO and SDE-GRPO, written out here in float64.

The generator is the library's, in float64, and so is the draw of the anchors. All between its predictions and the gradient is written from
the papers' equations: with x_i the candidates, x the anchor's prediction (or the states one Euler step on),

    AR-CoPO    d_i = |x_i - x|^2,  pi(i) = softmax_i(-d_i / tau),  rho_i = pi(i) / pi_old(i)
               J = mean over groups, (anchor, step) of 1/G sum_i min(rho_i A_i, clip(rho_i) A_i)
    SDE-GRPO   x' ~ N(mu, std^2 I),  log rho = mean over the elements of log N(x'; mu) - log N(x'; mu_old)
               J = mean over groups, (anchor, step) of min(rho A, clip(rho) A)

Errors are relative to the largest element of the reference.
"""

from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple

import pytest
import torch
from support.models import GLOBAL, SAMPLER, SHAPE, random_text, small_model
from torch import Tensor, nn

from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.model.lora import adapter_parameters, add_lora
from arcopo_fast.objectives.base import Objective
from arcopo_fast.objectives.copo import CopoObjective, CopoSettings
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective, SdeGrpoSettings
from arcopo_fast.objectives.updates import Updates
from arcopo_fast.rollout.cache import pages_for
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId

GROUP, PIVOTS = 6, (0, 2)
TOLERANCE = 1e-6
ETA, A = 0.3, 0.7
"""Of Dance-SDE, and of Flow-SDE and Flow-CPS: the published values."""


class Ratios(NamedTuple):
    """Of a group's items N: K ratios [N, K] float64 and the advantages that go with them."""

    rho: Tensor
    advantages: Tensor


Reference = Callable[[Group, Tensor, Tensor, Tensor, Tensor, Tensor], Ratios]
"""From a group, its advantages [G], steps [N], anchors [N], new and old predictions [N, F, C, h, w]."""


# The equations ---------------------------------------------------------------------------------------------------------------------


def euler(x: Tensor, clean: Tensor, sigma: float, following: float) -> Tensor:
    return x + (following - sigma) * (x - clean) / sigma


def sigma_after(group: Group, step: int) -> float:
    return (*group.steps.sigmas, 0.0)[step + 1]


def copo(distance: str, reduction: str, tau: float | str) -> Reference:
    def space(group: Group, step: int, x: Tensor, clean: Tensor) -> Tensor:
        """Where distances are taken."""
        x, clean = x.double(), clean.double()
        return clean if distance == "consistency" else euler(x, clean, group.steps.sigmas[step], sigma_after(group, step))

    def squared(difference: Tensor) -> Tensor:
        flat = difference.flatten(1).square()
        return flat.mean(1) if reduction == "mean" else flat.sum(1)

    def temperature(group: Group) -> float:
        """The median pairwise distance of the group, at its first step."""
        if tau != "auto":
            return float(tau)
        states = space(group, 0, group.inputs[0], group.predictions[0])
        pairs = [squared(states[i : i + 1] - states[j : j + 1]).item() for i in range(GROUP) for j in range(i)]
        return sorted(pairs)[len(pairs) // 2]  # of 15

    def ratios(group: Group, advantages: Tensor, steps: Tensor, anchors: Tensor, new: Tensor, old: Tensor) -> Ratios:
        rows = []
        for step, anchor, new_clean, old_clean in zip(steps.tolist(), anchors.tolist(), new, old):
            candidates = space(group, step, group.inputs[step], group.predictions[step])
            x = group.inputs[step, anchor]
            log_pi, log_pi_old = (
                torch.log_softmax(-squared(candidates - space(group, step, x, clean)) / temperature(group), dim=0)
                for clean in (new_clean, old_clean)
            )
            rows.append((log_pi - log_pi_old).exp())
        return Ratios(torch.stack(rows), advantages.expand(len(rows), -1))

    return ratios


def gaussian(kernel: str, s: float, following: float, x: Tensor, clean: Tensor) -> tuple[Tensor, float]:
    """Mean and standard deviation of the next state."""
    v, dt = (x - clean) / s, following - s
    noise = x + (1 - s) * v
    if kernel == "consistency":
        return (1 - following) * clean, following
    if kernel == "flow_cps":
        std = following * math.sin(A * math.pi / 2)
        return (1 - following) * clean + math.sqrt(following**2 - std**2) * noise, std
    g = ETA if kernel == "dance_sde" else A * math.sqrt(s / (1 - (s if s < 1 else following)))
    return x + (v + g**2 / 2 * noise / s) * dt, g * math.sqrt(-dt)


def sde_grpo(kernel: str) -> Reference:
    def ratios(group: Group, advantages: Tensor, steps: Tensor, anchors: Tensor, new: Tensor, old: Tensor) -> Ratios:
        rows = []
        for step, anchor, new_clean, old_clean in zip(steps.tolist(), anchors.tolist(), new, old):
            x, reached = group.inputs[step, anchor].double(), group.inputs[step + 1, anchor].double()
            log_densities = []
            for clean in (new_clean, old_clean):
                mean, std = gaussian(kernel, group.steps.sigmas[step], sigma_after(group, step), x, clean.double())
                log_densities.append(torch.distributions.Normal(mean, std).log_prob(reached).mean())
            rows.append((log_densities[0] - log_densities[1]).exp()[None])
        return Ratios(torch.stack(rows), advantages[anchors][:, None])

    return ratios


def surrogate(ratios: Ratios, clip: float) -> Tensor:
    """J of one group: the mean over everything that is left."""
    rho, advantages = ratios
    return torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages).mean()


def statistics_of(groups: list[Ratios], clip: float) -> dict[str, float]:
    """What an update reports, a mean over the groups. Live: the derivative of the minimum by the ratio is not zero."""

    def of(ratios: Ratios) -> dict[str, Tensor]:
        rho, advantages = ratios.rho.detach().requires_grad_(), ratios.advantages
        (slope,) = torch.autograd.grad(surrogate(Ratios(rho, advantages), clip), rho)
        moved = (rho.detach() - 1).abs()
        return {"ratio_max": moved.max(), "outside_clip": (moved > clip).double().mean(), "live": (slope != 0).double().mean()}

    each = [of(ratios) for ratios in groups]
    return {name: sum(one[name].item() for one in each) / len(each) for name in each[0]}


# Both on the same iteration --------------------------------------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Keeps the weights and the gradients of every step."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.weights.append([parameter.detach().clone() for parameter in parameters])
        self.gradients.append([parameter.grad.clone() for parameter in parameters])
        super().step(closure)


class Iteration:
    """Two groups of a small generator whose adapter is in the middle of training, and what the equations say of their updates."""

    def __init__(self, objective_class: Any, settings: Any, reference: Reference, dtype: torch.dtype) -> None:
        model = add_lora(small_model(), rank=3, alpha=6, targets=["to_q", "to_v", "to_out.0", "ffn.net.2"], seed=1).to(dtype)
        self.parameters = adapter_parameters(model)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.engine = Engine(model, SHAPE, SAMPLER, GLOBAL, pages=2 * pages_for(CacheConfig(), SHAPE.chunk_frames, GROUP))
        self.objective: Objective[Any] = objective_class(self.engine, settings)
        self.reference = reference
        plan, seed = self.objective.noise_plan(0.5), int(torch.randint(10**6, ()))
        self.groups = [
            self.engine.rollout(random_text(), GroupId(seed, group=index), pivot=pivot, members=GROUP, plan=plan)
            for index, pivot in enumerate(PIVOTS)
        ]
        drawn = torch.randn(len(PIVOTS), GROUP, dtype=torch.float64)
        self.advantages = (drawn - drawn.mean(1, keepdim=True)) / drawn.std(1, correction=0, keepdim=True)

    def put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights):
                parameter.copy_(value)

    def ratios(self, update: int, weights: list[Tensor]) -> list[Ratios]:
        """Of each group under `weights`, with gradient; old are the weights before the iteration."""
        items = [self.objective.draw_items(group, update) for group in self.groups]
        self.put(self.start)
        with torch.no_grad():
            old = [self.engine.predict(group, group.samples(*pair)) for group, pair in zip(self.groups, items)]
        self.put(weights)
        found = []
        for group, advantages, (steps, anchors), before in zip(self.groups, self.advantages, items, old):
            prediction = self.engine.predict(group, group.samples(steps, anchors))
            found.append(self.reference(group, advantages, steps, anchors, prediction, before))
        return found

    def gradient(self, groups: list[Ratios], clip: float) -> list[Tensor]:
        """Of the loss -J by every matrix of the adapter, under the weights of the ratios."""
        loss = -torch.stack([surrogate(ratios, clip) for ratios in groups]).mean()
        return list(torch.autograd.grad(loss, self.parameters, retain_graph=True))

    def choose(self) -> tuple[float, float, float]:
        """A learning rate by which the second update's ratios leave 1 by some 2 %, a clip in the midst of them, far from each, and the
        live fraction that it leaves."""
        gradient = self.gradient(self.ratios(0, self.start), 1.0)
        lr = 1e-3 / max(part.abs().max().item() for part in gradient)
        for _ in range(3):
            moved = [value - lr * part for value, part in zip(self.start, gradient)]
            second = self.ratios(1, moved)
            distances = torch.cat([(ratios.rho.detach() - 1).abs().flatten() for ratios in second]).sort().values
            used, lr = lr, lr * 0.02 / distances.median().item()
        self.put(self.start)
        middle = distances[len(distances) // 4 : -(len(distances) // 4)]
        place = middle.diff().argmax()
        clip = (middle[place] + middle[place + 1]).item() / 2
        return used, clip, statistics_of(second, clip)["live"]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative to the largest element of the expected tensors."""
    largest = max(tensor.abs().max().item() for tensor in expected)
    return max((one.double() - other.double()).abs().max().item() for one, other in zip(found, expected)) / largest


CASES: dict[str, tuple[Any, Any, Reference]] = {
    f"copo-{distance}-{reduction}-{tau}": (
        CopoObjective,
        CopoSettings(distance=distance, distance_reduction=reduction, tau=tau, anchors_per_update=2),  # type: ignore[arg-type]
        copo(distance, reduction, tau),
    )
    for distance in ("consistency", "flow_matching")
    for reduction in ("mean", "sum")
    for tau in (1.0, "auto")
} | {
    f"sde_grpo-{kernel}": (SdeGrpoObjective, SdeGrpoSettings(kernel=kernel, steps="all", anchors_per_update=3), sde_grpo(kernel))  # type: ignore[arg-type]
    for kernel in ("consistency", "dance_sde", "flow_sde", "flow_cps")
}


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_equations(case: str) -> None:
    """Gradients, matrix by matrix, and statistics of both updates."""
    check(case, torch.float64)


@pytest.mark.parametrize("case", ["copo-consistency-mean-1.0", "sde_grpo-consistency"])
def test_in_float32_the_whole_gradient_is_that_of_the_equations(case: str) -> None:
    """The backward pass through the generator rounds more than that in the matrices whose gradients nearly cancel."""
    check(case, torch.float32)


@pytest.mark.parametrize("case", ["copo-consistency-mean-1.0", "sde_grpo-consistency"])
def test_groups_that_give_their_pages_back_have_the_gradient_of_all_together(case: str) -> None:
    """The second update makes each group's context anew, under the weights that the group was made with."""
    check(case, torch.float64, one_by_one=True)


def check(case: str, dtype: torch.dtype, *, one_by_one: bool = False) -> None:
    live = 1.0
    while not 0 < live < 1:  # the ratios beyond the clip may all have moved the unfavorable way, where it does not act
        iteration = Iteration(*CASES[case], dtype)
        lr, clip, live = iteration.choose()
    objective = iteration.objective
    objective.settings = objective.settings.model_copy(update={"clip": clip})
    optimizer = Recorder(iteration.parameters, lr)
    with Updates(objective, Stepper(optimizer, gradient_clip=1e9)) as updates:
        for number, (group, advantages) in enumerate(zip(iteration.groups, iteration.advantages)):
            updates.learn(number, group, advantages)
            if one_by_one:
                group.put_away()
        statistics = updates.finish()
    if one_by_one:
        assert iteration.engine.pool.pages_in_use == 0, "no group may hold pages"
        iteration.put(iteration.start)
        for group in iteration.groups:
            iteration.engine.bring_back(group)
    assert len(optimizer.gradients) == 2
    assert (
        difference(optimizer.weights[1], [value - lr * part for value, part in zip(optimizer.weights[0], optimizer.gradients[0])])
        < TOLERANCE
    )
    for update, weights in enumerate(optimizer.weights):
        ratios = iteration.ratios(update, weights)
        expected, found = iteration.gradient(ratios, clip), optimizer.gradients[update]
        assert all(part.any() for part in expected)
        if dtype == torch.float64:
            errors = [difference([one], [other]) for one, other in zip(found, expected)]
        else:
            errors = [difference(found, expected)]
        assert max(errors) < TOLERANCE, (update, errors)
        for name, value in statistics_of(ratios, clip).items():
            assert statistics[f"update{update + 1}/{name}"] == pytest.approx(value, rel=TOLERANCE, abs=0), (update, name)
    assert statistics["update1/ratio_max"] == 0 and statistics["update1/live"] == 1
    assert 0 < statistics["update2/live"] < 1 and 0 < statistics["update2/outside_clip"] < 1
    for group in iteration.groups:
        group.release()
