"""SDE-GRPO in which every chunk explores at once: what is predicted again, and the gradient, against plain loops."""

from __future__ import annotations

import pytest
import torch
from support.adapted import GROUP, adapted_engine, make_group
from support.models import SHAPE
from torch.distributions import Normal

from arcopo_fast.model.lora import adapter_parameters
from arcopo_fast.objectives.advantage import zscore
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective, SdeGrpoSettings
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group


def objective_of(engine: Engine, **settings: object) -> SdeGrpoObjective:
    return SdeGrpoObjective(engine, SdeGrpoSettings.model_validate({"explore": "all", "steps": "all", **settings}))


def group_of(objective: SdeGrpoObjective) -> Group:
    return make_group(objective.engine, 1, objective.noise_plan(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explored_chunks_are_predicted_as_the_rollout_did(dtype: torch.dtype) -> None:
    """Bit for bit at the rollout's shapes; members in another order, several times, up to rounding."""
    objective = objective_of(adapted_engine(dtype))
    engine, everyone = objective.engine, torch.arange(GROUP)
    with group_of(objective) as group, torch.no_grad():
        for chunk, explored in group.explored.items():
            for step in range(len(explored.steps)):
                replayed = engine.predict(group, group.samples(torch.full((GROUP,), step), everyone, chunk))
                assert torch.equal(replayed, explored.predictions[step])
            steps, members = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 2, 2, 0])
            mixed = engine.predict(group, group.samples(steps, members, chunk))
            worst = (mixed - explored.predictions[steps, members]).norm() / mixed.norm()
            assert worst < (1e-5 if dtype == torch.float32 else 0.03)
        assert engine.pool.pages_in_use == group.prefix.cache.frames, "nothing of the members' contexts is kept"


@pytest.mark.parametrize("init_noise", ["shared", "fresh"])
def test_all_chunks_learn_from_the_same_advantage(init_noise: str) -> None:
    """The gradient is -mean over (member, chunk, step) of A d log p, each chunk in its member's own context, which is constant."""
    engine = adapted_engine(torch.float64)
    objective = objective_of(engine, init_noise=init_noise, updates=1, anchors_per_update=2, micro_batch=3)
    advantages, parameters = zscore(torch.randn(GROUP)), adapter_parameters(engine.model)
    with group_of(objective) as group:
        trained = objective.samples(group, 0)
        assert [samples.chunk for samples in trained] == list(range(1, SHAPE.chunks))
        assert len({tuple(samples.members.unique().tolist()) for samples in trained}) == 1, "the same members in every chunk"
        count, sums = sum(map(len, trained)), [torch.zeros_like(parameter) for parameter in parameters]
        for samples in trained:
            explored = group.explored[samples.chunk]
            for step, member in zip(samples.steps.tolist(), samples.members.tolist()):
                own = group.videos()[member : member + 1, : sum(SHAPE.chunk_frames[: samples.chunk])]
                with torch.no_grad():
                    context = engine.rebuild_prefix(group.text, own)
                sample = group.samples(torch.tensor([step]), torch.tensor([member]), samples.chunk)
                clean = engine.predict(group, sample, context=context)[0]
                transition = group.rule.transition(explored.steps.sigmas[step], explored.steps.next_sigma(step))
                policy = Normal(transition.mean(explored.inputs[step, member].double(), clean.double()), transition.std)
                loss = -advantages[member] * policy.log_prob(explored.inputs[step + 1, member].double()).mean()
                for total, gradient in zip(sums, torch.autograd.grad(loss / count, parameters)):
                    total += gradient
                context.cache.release()
        optimizer, gradients = torch.optim.SGD(parameters, lr=0.0), []
        optimizer.register_step_pre_hook(lambda *_: gradients.extend(parameter.grad.clone() for parameter in parameters))
        statistics = objective.update([(group, advantages)], Stepper(optimizer, gradient_clip=1e9))
    assert statistics["update1/ratio_max"] == 0
    found, expected = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (gradients, sums))
    assert expected.norm() > 0 and (found - expected).norm() < 3e-6 * expected.norm()
