"""The self-test: what must be true of any run, tried on one group with this machine, this generator and these rewards.

A run whose reward does not rise has either a bug or a recipe that does not suit it. These checks look for the bug: they use the recipe's
generator, sizes, kernels and rewards, and the very parts that training consists of, and compare with what is worked out here, apart from
those parts. `forecast` looks at the recipe. Nothing is written, nothing is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt
from arcopo_fast.evaluation.judging import Judging
from arcopo_fast.model.lora import adapter_disabled, adapter_state, load_adapter_state
from arcopo_fast.objectives.optimizer import GradientNotFinite, Stepper
from arcopo_fast.objectives.ratio import RatioNotOne, RatioObjective
from arcopo_fast.rollout.group import Samples
from arcopo_fast.rollout.noise import GroupId, KeyedNoise
from arcopo_fast.training.findings import Check, Finding, Replayed, ratio_objective
from arcopo_fast.training.forecast import forecast
from arcopo_fast.training.groups import JudgedGroup
from arcopo_fast.training.trainer import Trainer

LARGER_STEPS = (1, 10, 100)
"""Times the recipe's learning rate: in half precision one small step may lie below what a prediction can show."""
SAME_SCORE = 1e-3
"""In units of the group's spread: a score that moves more when other videos stand beside it is no score of the video."""
OWN_SCORE = 0.25
"""In the same units: a score that lies further from that of the member decoded and judged alone is another member's."""
ROLLOUT = "self-test"
"""Name of the policy that made the group."""
COMPANIONS = 3
"""Members that are judged alone and in each other's company."""


def one_group(config: Config) -> Config:
    """Return the recipe with one group, two updates and an evaluation as small as can be; sizes, kernels and precision stay."""
    pivot, middle = config.rollout.pivot, (config.rollout.pivots(config.video.count) + 1) // 2
    changes = {"prompts_per_iteration": 1, "pivots_per_video": 1, "pivot": pivot if isinstance(pivot, int) else middle}
    rollout = config.rollout.model_copy(update=changes)
    objective = config.objective.model_copy(update={"updates": 2, "anchors": "fresh"})
    train = config.train.model_copy(update={"mode": "on_policy", "buffer": None, "iterations": 1})
    return config.model_copy(update={"rollout": rollout, "objective": objective, "train": train})


def self_test(config: Config) -> Iterator[Finding]:
    """Yield findings, one after the other, as they come.

    Raises:
        UserError: the recipe cannot be used.
    """
    trainer = Trainer(one_group(config))
    rollouts, began = trainer.rollouts, time.monotonic()
    prompt = rollouts.prompt(1, 0)
    unperturbed = _unperturbed(trainer, prompt) if trainer.config.anchored else None
    with rollouts.roll_out(rollouts.encode(prompt), 1, 0, every_step=True) as group:
        judged = JudgedGroup.of(group, prompt, rollouts.judge(group, rollouts.decode(group), prompt))
        forked = f"{group.size} members that fork at chunk {group.pivot + 1} of {trainer.shape.chunks}"
        yield Finding("a group", None, f"{forked}, made and judged in {time.monotonic() - began:.1f} s")
        if unperturbed is not None:
            yield from _anchor(judged, unperturbed, trainer.generator.model.dtype)
        advantages = judged.advantages(trainer.config)
        yield from _advantages(trainer, judged, advantages)
        if not advantages.abs().any():  # the checks of the update need something to learn
            advantages = torch.linspace(-1, 1, group.size, dtype=torch.float64)
        check = Check(trainer, judged, rollouts.view(group, prompt), *_frames(trainer, judged), advantages)
        for checks in (_shared_frames, _fresh_adapter, _replay, _rewards):
            yield from checks(check)
        if not isinstance(trainer.objective, RatioObjective):
            yield from _any_update(check)
            return
        replayed = None
        for finding in _update(check):
            if isinstance(finding, Replayed):
                replayed = finding
            else:
                yield finding
        if config.train.mode != "on_policy":
            yield from _reference(check)
        if replayed is not None:
            yield from forecast(check, replayed)


@torch.no_grad()
def _unperturbed(trainer: Trainer, prompt: Prompt) -> Tensor:
    """Return the latents [1, F, C, h, w] of the first group's video, made as any video is, as far as the group's branches go."""
    config, engine, rollouts = trainer.config, trainer.engine, trainer.rollouts
    pivot, chunks = rollouts.pivot(1, 0), trainer.shape.chunks
    stop = chunks if config.rollout.horizon is None else pivot + config.rollout.horizon + 1
    noise = KeyedNoise(trainer.shape, GroupId(config.seed, 1, 0))
    with trainer.objective.policies.as_(trainer.objective.acting):
        stream = engine.start(rollouts.encode(prompt).to(engine.model.device))
        try:
            made = list(islice(engine.stream(stream, noise, switches=rollouts.switches(prompt)), stop))
        finally:
            stream.cache.release()
    return torch.cat([trajectory.predictions[-1] for trajectory in made], dim=1)


def _anchor(judged: JudgedGroup, unperturbed: Tensor, dtype: torch.dtype) -> Iterator[Finding]:
    """Check that the anchor is the video with no noise of its own, and that it has scores."""
    made = judged.group.anchor
    assert made is not None and judged.anchor is not None
    expected = unperturbed[:, -made.shape[1] :]
    apart = ((made - expected).square().mean() / expected.square().mean()).sqrt().item()
    detail = f"is the video in which no noise was changed, {'bit for bit' if apart == 0 else f'within {apart:.1g} of its size'}"
    yield Finding("the anchor", apart <= (1e-4 if dtype == torch.float32 else 0.05), detail)
    if failed := [name for name, score in judged.anchor.items() if not math.isfinite(score)]:
        yield Finding("the anchor's scores", False, f"are not all there: {', '.join(failed)} failed, so the group teaches nothing of them")


@torch.no_grad()
def _frames(trainer: Trainer, judged: JudgedGroup) -> tuple[Tensor, Tensor]:
    """Return the first members' frames, decoded as a group is, and each by itself."""
    rollouts, judging = trainer.rollouts, replace(Judging.of(trainer.config, trainer.generator), at_once=1)
    count = min(COMPANIONS, judged.group.size)
    view, shared, tails = rollouts.seen(judged.group)
    videos = torch.cat([shared.expand(count, *shared.shape[1:]), tails[:count]], dim=1).split(1)
    alone = [next(judging.decode(video[:, view.warmup :], video[:, : view.warmup], warmup=view.warmup)) for video in videos]
    return next(rollouts.decode(judged.group, at_once=count)), torch.cat(alone)


def _advantages(trainer: Trainer, judged: JudgedGroup, advantages: Tensor) -> Iterator[Finding]:
    """Check that advantages grow with the rewards; a group without any spread is another matter."""
    config = trainer.config
    weights = {name: weight for name, weight in config.score_weights.items() if weight}
    scores = {name: judged.rewards[name].double() for name in weights}
    scored = torch.stack(list(scores.values())).isfinite().all(0)

    def spread(values: Tensor) -> float:
        """Return the standard deviation over members with all scores, what to divide by; 1 where it is 0."""
        return max(values[scored].std(correction=0).item(), config.objective.advantage_std_floor) or 1.0

    total, apart = torch.zeros(len(advantages), dtype=torch.float64), config.objective.reward_combine == "per_reward_zscore"
    for window_weight, rewards in config.windows:
        of_window = torch.zeros_like(total)
        for name in (name for name in rewards if name in weights):
            of_window += rewards[name] * scores[name] / (spread(scores[name]) if apart else 1)
        total += window_weight * of_window / (1 if apart else spread(of_window))
    if scored.sum() < 2 or not advantages.any():
        yield Finding("the advantages", None, "no two members differ in reward, so there are none")
        return
    agreement = torch.corrcoef(torch.stack([total[scored], advantages[scored]]))[0, 1].item()
    yield Finding("the advantages", agreement > 0.8, f"grow with the rewards: a correlation of {agreement:.2f}")


def _shared_frames(check: Check) -> Iterator[Finding]:
    """Check that members show the same until the pivot, and not after it."""
    trainer, group, frames, view = check.trainer, check.judged.group, check.frames, check.view
    before = range(view.frames.start, sum(trainer.shape.chunk_frames[: group.pivot]))
    cut, expected = (view.pixels(part, trainer.generator.decoder.factor).stop for part in (before, view.frames))
    inside = bool(frames.isfinite().all()) and frames.min().item() >= 0 and frames.max().item() <= 1
    detail = f"{frames.shape[1]} of {expected}, from {frames.min():.2f} to {frames.max():.2f}"
    yield Finding("frames", inside and frames.shape[1] == expected, detail)
    if cut:
        equal = bool(torch.equal(frames[0, :cut], frames[1, :cut]))
        yield Finding("the shared context", equal, f"the first {cut} frames of two members are equal")
    different = (frames[0, cut:] - frames[1, cut:]).square().mean().sqrt().item()
    yield Finding("the perturbed noise", different > 0, f"from there on two members differ by {different:.3g} (root mean square of pixels)")


@torch.no_grad()
def _fresh_adapter(check: Check) -> Iterator[Finding]:
    """Check that a new adapter adds exactly nothing."""
    samples = _every_step(check)
    adapted = predictions(check, samples)
    with adapter_disabled(check.trainer.generator.model):
        base = predictions(check, samples)
    yield Finding("a new adapter", bool(torch.equal(adapted, base)), "predictions with it are those without it, bit for bit")


@torch.no_grad()
def _replay(check: Check) -> Iterator[Finding]:
    """Check that the replay predicts what the rollout did, in every chunk that explores, and twice the same."""
    group, samples = check.judged.group, _every_step(check)

    def replay() -> Tensor:
        return predictions(check, samples)

    replayed = replay()
    rolled_out = torch.cat([group.explored[part.chunk].predictions[part.steps, part.members] for part in samples])
    apart = ((replayed - rolled_out).square().mean() / rolled_out.square().mean()).sqrt().item()
    largest = 1e-4 if check.trainer.generator.model.dtype == torch.float32 else 0.05
    detail = "bit for bit" if apart == 0 else f"within {apart:.1g} of their size, from batches of another shape; the ratio never sees that"
    yield Finding("the replay", apart <= largest, f"gives back the rollout's predictions {detail}")
    yield Finding("its repetition", bool(torch.equal(replayed, replay())), "the same predictions again, bit for bit")


def _rewards(check: Check) -> Iterator[Finding]:
    """Check that each video's score is its own: that of the member decoded and judged alone, whatever stands beside it."""
    trainer, frames = check.trainer, check.frames
    text = check.judged.prompt.text
    other_texts = [prompt.text for prompt in [*trainer.prompts.training, *trainer.prompts.evaluation] if prompt.text != text]
    prompts = [text, *other_texts, text, text][: len(frames)]  # distinct as far as there are any
    for name in trainer.config.score_weights:
        spread = check.spread(name)
        judge = partial(check.judge, name)
        began = time.monotonic()
        with check.at_work(name):
            alone = torch.cat([judge(frames_alone[None], [text]) for frames_alone in check.frames_alone])
            pairs = [(1, 0), *combinations(range(len(frames)), 2)]  # the middle one of three meets the best, and the worst
            company = [judge(frames[list(pair)], [prompts[video] for video in pair]).tolist() for pair in pairs]
        seconds = (time.monotonic() - began) / (len(alone) + 2 * len(pairs))
        scores_of: dict[int, list[float]] = {}
        for pair, scores in zip(pairs, company):
            for video, value in zip(pair, scores):
                scores_of.setdefault(video, []).append(value)
        deviation = max(max(values) - min(values) for values in scores_of.values())
        group_scores = check.judged.rewards[name][: len(alone)].double()
        own_error = max((alone - group_scores).abs().max().item(), abs(scores_of[0][0] - alone[0].item()))
        size = spread if spread > 0 else max(alone.abs().max().item(), 1e-30) * 1e-3
        mean = check.judged.rewards[name].mean()
        detail = (
            f"{mean:.3g} on average, spread in the group {spread:.2g}; in other company within {deviation:.1g}, of members judged alone "
            f"within {own_error:.1g}; {seconds:.2f} s a video"
        )
        finite = bool(alone.isfinite().all()) and all(map(math.isfinite, chain(*scores_of.values())))
        holds = finite and deviation <= SAME_SCORE * size
        yield Finding(f"reward {name}", holds and (own_error <= OWN_SCORE * spread or not spread > 0), detail)
        if not spread > 0:
            yield Finding(f"reward {name}", None, "does not tell the members apart: raise rollout.noise_strength, or take another reward")


def _any_update(check: Check) -> Iterator[Finding]:
    """Check that two updates of an objective without a ratio give finite numbers and move the weights."""
    start = {name: tensor.clone() for name, tensor in adapter_state(check.trainer.generator.model).items()}
    try:
        statistics, _ = _two_steps(check, 1)
    except GradientNotFinite as error:
        yield Finding("the gradient", False, str(error))
        return
    yield Finding("the gradient", statistics["gradient_norm"] > 0, f"of the adapter: norm {statistics['gradient_norm']:.3g}")
    moved = _moved(start, adapter_state(check.trainer.generator.model))
    yield Finding("the weights", moved > 0.99, f"{100 * moved:.1f} % of those with a gradient have moved after two steps")


def _update(check: Check) -> Iterator[Finding | Replayed]:
    """Check that the ratio is 1 before the first step, that the old policy stays the old one, and that a step raises what it shall
    raise."""
    trainer, objective, group = check.trainer, ratio_objective(check), check.judged.group
    start = {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in trainer.parameters}
    yield Finding("the master weights", kinds == {"float32"}, f"of the adapter are {', '.join(sorted(kinds))}")
    target = objective.target(group, check.advantages)
    first, second = (objective.samples(group, update) for update in range(2))
    old_first, old_second = predictions(check, first), predictions(check, second)
    objective.policies.keep(ROLLOUT)
    replayed = None
    for factor in LARGER_STEPS:
        load_adapter_state(trainer.generator.model, start)
        try:
            statistics, between = _two_steps(check, factor)
        except (RatioNotOne, GradientNotFinite) as error:
            yield Finding("the ratio" if isinstance(error, RatioNotOne) else "the gradient", False, str(error))
            return
        if not between:
            yield Finding("the gradient", False, "of the adapter is 0: nothing is learned from members that differ")
            return
        moved = _moved(start, adapter_state(trainer.generator.model))
        load_adapter_state(trainer.generator.model, between[0])
        gain = _gain(check, target, first, old_first)
        ratio_minus_one, live, _ = _compare(check, target, second, old_second, ROLLOUT)
        if factor == 1:
            replayed = Replayed(statistics, _steps(second), ratio_minus_one, live, gain, moved)
            yield Finding("the ratio", statistics["update1/ratio_max"] == 0, "exactly 1 before the first update")
            yield Finding("the gradient", statistics["gradient_norm"] > 0, f"of the adapter: norm {statistics['gradient_norm']:.3g}")
        if gain != 0:
            break
    reported, measured = statistics.get("update2/ratio_max", 0.0), ratio_minus_one.abs().max().item()
    agree = abs(reported - measured) <= 1e-3 * measured
    detail = f"in the second update |ratio - 1| reaches {reported:.3g}; against the policy that made the group it is {measured:.3g}"
    yield Finding("the old policy", agree and measured > 0, detail)
    yield Finding("the weights", moved > 0.99, f"{100 * moved:.1f} % of those with a gradient have moved after two steps")
    step = "one update" if factor == 1 else f"one update at {factor} times the learning rate"
    yield Finding("the objective", gain > 0, f"{step} makes well-scored members likelier: the mean of A (ratio - 1) is {gain:+.2g}")
    if replayed is not None:
        yield replayed


def _reference(check: Check) -> Iterator[Finding]:
    """Check that groups from a buffer are compared with the generator without its adapter, which has moved by now."""
    trainer, group = check.trainer, check.judged.group
    objective = type(ratio_objective(check))(trainer.engine, ratio_objective(check).settings, reference=True)
    samples = objective.samples(group, 0)
    with adapter_disabled(trainer.generator.model):
        old = predictions(check, samples)
    measured = _compare(check, objective.target(group, check.advantages), samples, old, "reference")[0].abs().max().item()
    optimizer = torch.optim.AdamW(trainer.parameters, lr=trainer.config.optimizer.lr)
    reported = objective.update([(group, check.advantages)], Stepper(optimizer, eps=trainer.config.optimizer.eps))["update1/ratio_max"]
    detail = f"|ratio - 1| of a moved policy reaches {reported:.3g}; against the generator without its adapter it is {measured:.3g}"
    yield Finding("the reference policy", abs(reported - measured) <= 1e-3 * measured and measured > 0, detail)


def _two_steps(check: Check, factor: int) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Do an iteration's two updates at a multiple of the learning rate; return its statistics, and the adapter after each step."""
    trainer, settings = check.trainer, check.trainer.config.optimizer
    optimizer = torch.optim.AdamW(trainer.parameters, lr=factor * settings.lr, betas=settings.betas, weight_decay=0.0)
    after: list[dict[str, Tensor]] = []
    state = adapter_state(trainer.generator.model)  # views: the optimizer writes into what they show
    optimizer.register_step_post_hook(lambda *_: after.append({name: tensor.clone() for name, tensor in state.items()}))
    statistics = trainer.objective.update([(check.judged.group, check.advantages)], Stepper(optimizer, eps=settings.eps))
    return statistics, after


def _moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Return the share of elements that changed, of tensors of which any did."""
    changes = [before[name] != after[name] for name in before]
    counts = [(int(change.sum()), change.numel()) for change in changes if change.any()]
    return sum(moved for moved, _ in counts) / max(1, sum(size for _, size in counts))


@torch.no_grad()
def _compare(check: Check, target: object, samples: Sequence[Samples], old: Tensor, maker: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ratio - 1 [N, K], live [N, K] and losses [N] of samples under the present weights, against predictions `old` of the policy
    that made the group."""
    objective, group, parts = ratio_objective(check), check.judged.group, _micro_batches(check, samples)
    outcomes = [
        objective.ratio(group, target, part, _predict(check, part, maker), before)
        for part, before in zip(parts, old.split([len(part) for part in parts]))
    ]
    ratios, live, losses = (
        torch.cat(values) for values in zip(*((outcome.ratio_minus_one, outcome.live, outcome.loss) for outcome in outcomes))
    )
    return ratios.cpu(), live.cpu(), losses.cpu()


def _gain(check: Check, target: object, samples: Sequence[Samples], old: Tensor) -> float:
    """Return the mean of A (ratio - 1) over samples and the members that each ratio depends on."""
    ratio_minus_one, _, _ = _compare(check, target, samples, old, ROLLOUT)
    members = torch.cat([part.members for part in samples])
    advantages = check.advantages.to(ratio_minus_one)
    weights = advantages.expand_as(ratio_minus_one) if ratio_minus_one.shape[1] > 1 else advantages[members][:, None]
    return (weights * ratio_minus_one).mean().item()


def _every_step(check: Check) -> list[Samples]:
    """Return every step of the first member's chunks that explore."""
    objective, group, samples = check.trainer.objective, check.judged.group, []
    for chunk, explored in group.explored.items():
        steps = objective.trainable_steps(explored.steps) if isinstance(objective, RatioObjective) else len(explored.steps)
        samples.append(group.samples(torch.arange(steps), torch.zeros(steps, dtype=torch.long), chunk))
    return samples


def _steps(samples: Sequence[Samples]) -> Tensor:
    """Return the sampler's steps of samples that the rollout had, [N]."""
    return torch.cat([part.steps for part in samples if part.steps is not None])


def _micro_batches(check: Check, samples: Sequence[Samples]) -> list[Samples]:
    """Return the samples, as many at once as in training."""
    return [part for chunk in samples for part in chunk.split(check.trainer.objective.settings.micro_batch or len(chunk))]


def _predict(check: Check, samples: Samples, maker: str = "live") -> Tensor:
    """Return x0hat of samples of one chunk, [N, F, C, h, w], under the present weights, in the context that the policy `maker` made."""
    engine, group = check.trainer.engine, check.judged.group
    with ExitStack() as stack:
        with check.trainer.objective.policies.as_(maker):
            context = stack.enter_context(engine.context(group, samples.chunk, samples.members))
        return engine.predict(group, samples, context=context)


@torch.no_grad()
def predictions(check: Check, samples: Sequence[Samples]) -> Tensor:
    """Return x0hat of samples [N, F, C, h, w] under the present weights."""
    return torch.cat([_predict(check, part) for part in _micro_batches(check, samples)])
