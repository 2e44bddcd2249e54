"""Astrolabe: its loss, its samples and its gradient, each against a formula in float64 or a plain loop.

Of the method's twelve acceptance tests these are 1, 2, 3, 5, 6, 7, 8 and 9; 4 and 12 are in test_nft_policies.py. Those of its judges and
of VBench, 10 and 11, are tests of these: test_every_tensor_must_be_there_under_its_name, test_only_text_alignment_depends_on_the_prompt and
test_as_few_forwards_as_possible of the judges, test_total_of_the_paper and test_a_missing_dimension_is_named of VBench.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from arcopo_kernels.nft import nft_loss
from pydantic import ValidationError
from support.adapted import GROUP, adapted_engine, fresh_engine
from support.models import SHAPE, random_text, small_engine, small_model
from support.recipes import BASE, load, message, write
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.model.lora import adapter_parameters, adapter_state
from arcopo_fast.objectives.advantage import group_advantages, zscore
from arcopo_fast.objectives.nft import NFTObjective, NFTSettings
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.planning.spread import Spread
from arcopo_fast.rollout.contexts import Contexts
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, MemberNoise
from arcopo_fast.rollout.scheduler import Schedule
from arcopo_fast.training.groups import prompt_of

F64 = torch.float64


def objective_of(engine: Engine, **settings: object) -> NFTObjective:
    return NFTObjective(engine, NFTSettings.model_validate(settings))


def group_of(objective: NFTObjective, pivot: int = 1, **more: Any) -> Group:
    name = GroupId(int(torch.randint(10**6, ())), 3, 1)
    return objective.engine.rollout(random_text(), name, pivot=pivot, members=GROUP, plan=objective.noise_plan(0.5), **more)


def two_branches(p: Tensor, p_old: Tensor, clean: Tensor, r: Tensor, beta: float) -> Tensor:
    """The loss [N] in float64, as the paper writes it."""
    p, p_old, clean, r = (tensor.double() for tensor in (p, p_old, clean, r))
    plus, minus = (1 - beta) * p_old + beta * p, (1 + beta) * p_old - beta * p
    return r * (plus - clean).square().flatten(1).mean(1) + (1 - r) * (minus - clean).square().flatten(1).mean(1)


# 1 and 2: the loss


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_1_the_loss_is_that_of_two_branches_and_its_optimum_is_the_theorems(beta: float) -> None:
    """On samples of a Gaussian, p* = p_old + 2 / beta * alpha (m_plus - p_old), alpha the mean reward, m_plus the mean weighted by it."""
    clean, r = torch.randn(4000, 3, dtype=F64), torch.rand(4000, dtype=F64)
    p_old = clean.mean(0)  # what a policy predicts that knows the distribution
    p = (p_old + torch.randn(3, dtype=F64)).requires_grad_()
    out = nft_loss(p.expand(4000, 3), p_old.expand(4000, 3), clean, r, beta=beta)
    torch.testing.assert_close(out.loss, two_branches(p.expand(4000, 3), p_old.expand(4000, 3), clean, r, beta))
    (gradient,) = torch.autograd.grad(out.loss.mean(), p)
    optimum = p.detach() - gradient / (2 * beta**2 / 3)  # the loss is a parabola in p
    alpha, plus = r.mean(), (r[:, None] * clean).sum(0) / r.sum()
    torch.testing.assert_close(optimum, p_old + 2 / beta * alpha * (plus - p_old), rtol=1e-9, atol=1e-9)


def test_2_the_loss_in_x0_space_is_sigma_squared_times_that_of_velocities() -> None:
    clean, noise = torch.randn(5, 40, dtype=F64), torch.randn(5, 40, dtype=F64)
    v, v_old, r, sigma = torch.randn(5, 40, dtype=F64), torch.randn(5, 40, dtype=F64), torch.rand(5, dtype=F64), torch.rand(5, 1, dtype=F64)
    x = (1 - sigma) * clean + sigma * noise
    in_x0 = nft_loss(x - sigma * v, x - sigma * v_old, clean, r, beta=0.3).loss
    of_velocity = nft_loss(v, v_old, noise - clean, r, beta=0.3).loss
    torch.testing.assert_close(in_x0, sigma[:, 0] ** 2 * of_velocity)


# 3: advantages and r


def test_3_r_is_the_clamped_advantage_and_one_half_where_nothing_differs() -> None:
    objective = objective_of(fresh_engine())
    with group_of(objective) as group:
        given = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 7.0], dtype=F64)
        assert objective.target(group, given).r.tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1])
        alike = group_advantages({"a": torch.full((GROUP,), 0.3)}, {"a": 1.0})
        assert objective.target(group, alike).r.tolist() == [0.5] * GROUP
        failed = group_advantages({"a": torch.tensor([0.1, float("nan"), 0.4, 0.2, 0.9, 0.5])}, {"a": 1.0})
        r = objective.target(group, failed).r
        assert r[1] == 0.5 and r.isfinite().all() and r.mean().item() == pytest.approx(0.5), "no other member moves the center"


# 5: prompts and groups


@pytest.mark.parametrize("world", [1, 8, 48])
def test_5_every_group_of_an_iteration_has_a_prompt_of_its_own_on_any_number_of_ranks(world: int) -> None:
    """48 prompts with 24 videos each, of 50,000; the released sampler gives 8 ranks one prompt 384 times."""
    groups, size, prompts = 48, 24, [Prompt(f"prompt {number}") for number in range(50_000)]
    config = load_config("self_forcing_astrolabe", ["seed=7"])
    spread = Spread(min(world, groups), max(1, world // groups))
    for iteration in (1, 2):
        numbers = [number for rank in range(0, world, spread.ranks) for number in spread.groups(rank, groups)]
        videos = Counter(prompt_of(config, prompts, iteration, number) for number in numbers for _ in range(size))
        assert sorted(numbers) == list(range(groups)) and len(videos) == groups and set(videos.values()) == {size}
        assert videos == Counter(prompt_of(config, prompts, iteration, number) for number in range(groups) for _ in range(size))


# 6 and 7: forks and the training pass


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(variant="longlive", window=6, sink=2)], ids=["all", "window and sink"])
@pytest.mark.parametrize("pivot", [0, 2])
def test_6_a_member_is_the_video_of_its_noises_and_the_prefix_stays_untouched(pivot: int, cache: CacheConfig) -> None:
    """Bit for bit in float32, member by member; sinks are in view after frames have left the window."""
    engine, text = small_engine(small_model(), cache=cache), random_text()
    plan, shared = objective_of(engine).noise_plan(0.5), KeyedNoise(SHAPE, GroupId(5, 1, 2))
    whole = [engine.generate(text, MemberNoise(shared, plan, pivot, [member])) for member in range(2)]
    for member, video in enumerate(whole):
        with engine.rollout(text, shared.id, pivot=pivot, members=2, plan=plan, part=range(member, member + 1)) as group:
            assert torch.equal(group.videos(), video) and not group.explored
            again = engine.rebuild_prefix(text, group.prefix_latents)
            kept, made = (engine.pool.runs(stream.cache.tables) for stream in (group.prefix, again))
            for ours, theirs in zip(kept, made, strict=True):
                assert all(torch.equal(*pair) for pair in zip(engine.pool.read(0, ours), engine.pool.read(0, theirs)))
            again.cache.release()
    assert engine.pool.pages_in_use == 0 and not torch.equal(*(video[:, -2:] for video in whole))
    assert torch.equal(*(video[:, : 2 * pivot] for video in whole))


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(variant="longlive", window=6, sink=2)], ids=["all", "window and sink"])
def test_7_the_training_pass_predicts_what_the_rollout_did(cache: CacheConfig) -> None:
    """For the same x_t, t, weights and members, in every trained chunk, bit for bit."""
    engine = adapted_engine(cache=cache)
    objective = objective_of(engine)
    plan = dataclasses.replace(objective.noise_plan(0.5), keep="trajectory")
    with engine.rollout(random_text(), GroupId(3), pivot=1, members=GROUP, plan=plan) as group, torch.no_grad():
        trained = objective.samples(group, 0)
        assert [part.chunk for part in trained] == list(group.explored) == [1, 2, 3]
        for going_on in (True, False):
            with Contexts(engine, group, until=3) as contexts:
                for part in trained:
                    explored = group.explored[part.chunk]
                    for step in range(len(explored.steps)):
                        rolled = group.samples(torch.full((GROUP,), step), torch.arange(GROUP), part.chunk)
                        context = contexts.of(part.chunk, part.members) if going_on else None
                        assert torch.equal(engine.predict(group, rolled, context=context), explored.predictions[step])
        assert engine.pool.pages_in_use == group.prefix.cache.frames


def test_each_context_goes_on_from_that_of_the_chunk_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clean pass for each chunk of a micro-batch, for all policies together; other members begin anew."""
    engine = adapted_engine()
    objective, passes, append = objective_of(engine, micro_batch=4), list[int](), engine.append
    with group_of(objective) as group:
        monkeypatch.setattr(
            engine, "append", lambda stream, *given, **named: (passes.append(stream.frame), append(stream, *given, **named))[1]
        )
        objective.update([(group, zscore(torch.randn(GROUP)))], Stepper(torch.optim.SGD(adapter_parameters(engine.model), lr=0.1)))
        assert passes == [2, 4] * 2, "chunks 1 and 2 of four members, then of two"
        passes.clear()
        objective.update([(group, zscore(torch.randn(GROUP)))], Stepper(torch.optim.SGD(adapter_parameters(engine.model), lr=0.1)))
        assert passes == [2, 4] * 2, "the old policy is another one by now"
        with Contexts(engine, group, until=3) as contexts:
            contexts.of(3, torch.tensor([0, 1, 2, 3]))
            passes.clear()
            for chunk, members in ((3, [3, 2, 2, 1]), (2, [3, 2, 1]), (3, [3, 2, 1])):
                found = contexts.of(chunk, torch.tensor(members))
                assert found.frame == 2 * chunk and len(found.cache.tables) == len(members)
            assert passes == [2, 4, 2, 4], "of members 1 to 3, back for an earlier chunk, and on"


# 8 and 9: chunks and precision


def test_8_chunks_have_the_size_of_a_setting_that_nothing_can_change(base: None) -> None:
    """Rollout and training read it in one place; the network has no number of frames of its own."""
    engine = adapted_engine()
    objective = objective_of(engine)
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.shape.chunk_frames = (1,) * 8  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        load().video.chunk_frames = 1  # type: ignore[misc]
    assert not [name for name in vars(engine.model.config) if "chunk" in name or "frames" in name or "block" in name]
    with group_of(objective) as group:
        assert [part.x.shape[1] for part in objective.samples(group, 0)] == list(engine.shape.chunk_frames[1:])


def test_9_the_adapter_is_float32_and_a_step_of_1e_5_reaches_every_element() -> None:
    """On a bfloat16 generator, whose own numbers near 0.1 lie 5e-4 apart."""
    engine = adapted_engine(torch.bfloat16)
    objective, parameters = objective_of(engine), adapter_parameters(engine.model)
    assert engine.model.dtype == torch.bfloat16 and {parameter.dtype for parameter in parameters} == {torch.float32}
    before = [parameter.detach().clone() for parameter in parameters]
    with group_of(objective) as group:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0)
        objective.update([(group, zscore(torch.randn(GROUP)))], Stepper(optimizer, eps=1e-8))
    moved = torch.cat([(parameter - was).abs().flatten() for parameter, was in zip(parameters, before)])
    assert (moved > 0).double().mean() > 0.99 and moved.max() < 2e-5
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert {tensor.dtype for tensor in objective.policies.state_dict()["old"].values()} == {torch.float32}


# Samples


def test_samples_are_the_clean_chunks_noised_anew_at_the_samplers_steps() -> None:
    objective = objective_of(adapted_engine())
    engine = objective.engine
    with group_of(objective) as group:
        once, again, later, drawn = (objective.samples(group, *key) for key in ((0,), (0,), (1,), (0, (9, 4))))
        chunks, seen = group.own_chunks(SHAPE.chunk_frames), set[float]()
        for part in once:
            assert part.members.tolist() == list(range(GROUP)) and part.steps is None
            places = [engine.steps.timesteps.index(timestep) for timestep in part.timesteps.tolist()]
            assert part.sigmas.tolist() == pytest.approx([engine.steps.sigmas[place] for place in places])
            sigma = part.sigmas.view(-1, 1, 1, 1, 1)
            noise = (part.x - (1 - sigma) * chunks[part.chunk]) / sigma
            assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
            assert len({tuple(row.flatten().tolist()) for row in noise}) == GROUP
            seen |= set(places)
        assert seen == {0, 1, 2}, "all of the sampler's steps, the first among them"
        for part, same, other, third in zip(once, again, later, drawn):
            assert torch.equal(part.x, same.x) and not torch.equal(part.x, other.x) and not torch.equal(part.x, third.x)


def test_timesteps_raw_and_uniform() -> None:
    engine = adapted_engine()
    with group_of(objective_of(engine)) as group:
        raw = torch.cat([part.timesteps for part in objective_of(engine, timesteps="raw").samples(group, 0)])
        assert set(raw.tolist()) == {1000, 750, 500} and engine.steps.timesteps[1] == pytest.approx(937.5)
        uniform = torch.cat([part.timesteps for part in objective_of(engine, timesteps="uniform").samples(group, 0)])
        assert len(set(uniform.tolist())) == len(uniform) and 0 < uniform.min() < uniform.max() <= 1000
        for part in objective_of(engine, timesteps="uniform").samples(group, 0):
            assert part.sigmas.tolist() == pytest.approx([Schedule(5.0).sigma(value) for value in part.timesteps.tolist()])


def test_only_so_many_chunks_explore_and_are_trained() -> None:
    objective = objective_of(adapted_engine(), explored_chunks=2)
    with group_of(objective) as group:
        assert [part.chunk for part in objective.samples(group, 0)] == [1, 2]
    with group_of(objective_of(objective.engine), horizon=1) as group:
        assert [part.chunk for part in objective_of(objective.engine).samples(group, 0)] == [1, 2], "branches end with the horizon"
        assert objective.noise_plan(0.5).chunks == 2 and objective.noise_plan(0.5).keep == "clean"


# The gradient


@pytest.mark.parametrize(
    ("micro_batch", "settings"), [(4, {"kl": "none"}), (None, {"kl": "uniform", "kl_weight": 0.3})], ids=["alone", "uniform distance"]
)
def test_the_gradient_is_that_of_a_plain_loop(micro_batch: int | None, settings: dict[str, Any]) -> None:
    """In float64: each chunk in its member's own context, made by the old policy, and a mean over elements, chunks and members."""
    engine = adapted_engine(F64)
    objective = objective_of(engine, micro_batch=micro_batch, beta=0.4, **settings)
    parameters, advantages = adapter_parameters(engine.model), 3 * zscore(torch.randn(GROUP))
    objective.begin()
    with group_of(objective) as group:
        with torch.no_grad():
            for parameter in parameters:  # the live policy has gone on since it was the old one, and the reference
                parameter.add_(0.05 * torch.randn_like(parameter))
        trained = objective.samples(group, 0)
        count, sums = sum(map(len, trained)), [torch.zeros_like(parameter) for parameter in parameters]
        for part in trained:
            for row in range(len(part)):
                own = group.videos()[row : row + 1, : sum(SHAPE.chunk_frames[: part.chunk])]
                sample = part.part(slice(row, row + 1))
                with objective.policies.as_("old"), torch.no_grad():
                    context = engine.rebuild_prefix(group.text, own)
                    p_old = engine.predict(group, sample, context=context)
                p = engine.predict(group, sample, context=context)
                clean = group.own_chunks(SHAPE.chunk_frames)[part.chunk][row : row + 1]
                loss = two_branches(p, p_old, clean, 0.5 + advantages[row : row + 1].clamp(-5, 5) / 10, 0.4).sum()
                if settings["kl"] == "uniform":
                    loss = loss + 0.3 * (p - p_old).square().mean()
                for total, gradient in zip(sums, torch.autograd.grad(loss / count, parameters)):
                    total += gradient
                context.cache.release()
        optimizer, gradients = torch.optim.SGD(parameters, lr=0.0), list[Tensor]()
        optimizer.register_step_pre_hook(lambda *_: gradients.extend(parameter.grad.clone() for parameter in parameters))
        statistics = objective.update([(group, advantages)], Stepper(optimizer))
        assert statistics["update1/drift"] > 0
        for found, expected in zip(gradients, sums, strict=True):  # of the adapter, which is float32
            assert (found - expected).norm() <= 1e-6 * expected.norm() > 0


def test_updates_pull_towards_good_videos() -> None:
    engine = fresh_engine()
    objective = objective_of(engine, updates=4, old="sync")
    advantages = 3 * zscore(torch.randn(GROUP))
    with group_of(objective) as group:

        def distances() -> Tensor:
            chunks, found = group.own_chunks(SHAPE.chunk_frames), []
            for part in objective.samples(group, 0):
                with torch.no_grad():
                    found.append((engine.predict(group, part) - chunks[part.chunk]).square().flatten(1).mean(1))
            return torch.stack(found).mean(0)

        before = distances()
        start = {name: tensor.clone() for name, tensor in adapter_state(engine.model).items()}
        statistics = objective.update([(group, advantages)], Stepper(torch.optim.AdamW(adapter_parameters(engine.model), lr=3e-3)))
        assert ((distances() - before) * advantages).sum() < 0
        assert statistics["update1/drift"] == 0 < statistics["update4/drift"]
        assert any(not torch.equal(start[name], tensor) for name, tensor in adapter_state(engine.model).items())
        assert engine.pool.pages_in_use == group.prefix.cache.frames


# Settings


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with a small recipe."""
    write(tmp_path / "base.yaml", BASE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("kl: selective, kl_primary: toy_mq, beta: 0", "objective.beta: expected a number > 0; given 0"),
        ("advantage_max: null", "objective.advantage_max: expected a number > 0; given null"),
        ("kl: selective, kl_primary: toy_ta", "objective.kl_primary 'toy_ta' is not among the rewards that have a weight: toy_vq, toy_mq"),
        ("timesteps: all", "objective.timesteps: expected warped, raw or uniform"),
        ("clip: 1.0e-4", "unknown key objective.clip"),
    ],
)
def test_settings_that_do_not_do_are_refused(settings: str, said: str, base: None) -> None:
    assert said in message(f"objective={{kind: nft, {settings}}}")


def test_selective_regularization_needs_two_rewards(base: None) -> None:
    assert "selective compares rewards, and only toy_vq has a weight" in message(
        "objective={kind: nft, kl: selective}", "rewards={toy_vq: 1, toy_mq: 0}"
    )


def test_what_is_known_to_blur_is_warned_of_with_figures() -> None:
    defaults = NFTSettings()
    assert defaults.risks(24, 3) == [] and (defaults.timesteps, defaults.updates, defaults.advantage_max) == ("warped", 1, 5)
    for timesteps in ("raw", "uniform"):
        (risk,) = NFTSettings(timesteps=timesteps).risks(24, 3)
        assert f"objective.timesteps={timesteps}" in risk and "0.031" in risk and "2.19" in risk
    (risk,) = defaults.risks(27, 3)
    assert "may cut advantages of a group of 27" in risk and "1.59" in risk
    (risk,) = defaults.risks(24, 4)
    assert "video.chunk_frames=4" in risk
