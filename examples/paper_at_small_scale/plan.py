"""The study's runs: methods, parts, and what each part has to do. Runs nothing.

A part takes at most two hours on two cores and leaves one result, results/NAME.json. `tune` comes first: it sweeps learning rate and clip
of each method, with the same number of runs, on seeds of its own, and later parts train with the pair that it chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from erring import EXACT, LEVELS

from arcopo_fast.config.reading import load_config
from arcopo_fast.config.schema import Config, objective_class
from arcopo_fast.errors import UserError


@dataclass(frozen=True)
class Method:
    """A way to train.

    clip: the one that the sweep lies around. tuned_as: the method whose pair it takes; empty: its own. mode: of `train.mode`; other than
    on_policy it takes its groups from a buffer.
    """

    title: str
    recipe: str
    settings: tuple[str, ...] = ()
    clip: float = 0.0
    tuned_as: str = ""
    mode: str = "on_policy"


# AR-CoPO's is the recipe's, which stops half of the second update's terms at first. The others were measured on the earlier step list with
# one prompt an iteration (`update2/ratio_std` in results/tune.json will say it again): one update of SDE-GRPO moves the ratios by 8e-4, on
# the unscaled list by a twentieth of that, of Neighbor GRPO by 1e-3. They are as tight as a clip of 5e-3 was for AR-CoPO there.
COPO_CLIP, SDE_CLIP, SDE_UNSCALED_CLIP, NEIGHBOR_CLIP, STORED_CLIP = 3e-3, 1.5e-3, 1e-4, 2e-3, 1e-3
FACTORS = ((1, 1), (0.5, 1), (2, 1), (1, 1 / 3), (1, 3))
"""Factors on the recipe's learning rate and the clip above: the pairs of a sweep, a star."""
SHARED = "objective.init_noise=shared"
UNSCALED = ("sampler.steps=[1000, 750, 500, 250]", "sampler.warp=true", "sampler.shift=5")
"""The paper's step list as it is, not scaled to the size of the toy: on it the re-noise decides."""
PUBLISHED = ("objective.explore=all", "rollout.pivot=1", "objective.anchors_per_update=2")
"""SDE-GRPO as published: every chunk explores at once, with one advantage for the whole video. A quarter of the members in four chunks are
as many replays."""
CAPTION_ONLY = "rewards={toy_ta: 1, toy_vq: 0, toy_mq: 0}"
"""The others are still measured; at weight 0 they count as held out."""

METHODS = {
    "ar_copo": Method("AR-CoPO", "toy", clip=COPO_CLIP),
    "sde_shared": Method("SDE-GRPO, forked, shared initial noise", "toy_sde_grpo", (SHARED,), SDE_CLIP),
    "sde_fresh": Method("SDE-GRPO, forked, fresh initial noise", "toy_sde_grpo", ("objective.init_noise=fresh",), SDE_CLIP),
    "sde_published": Method("SDE-GRPO as published", "toy_sde_grpo", PUBLISHED, SDE_CLIP),
    # Two anchors instead of four: a chunk of Neighbor GRPO is the whole video, and as many frames shall be replayed.
    "neighbor": Method("Neighbor GRPO", "toy_neighbor_grpo", ("objective.anchors_per_update=2",), NEIGHBOR_CLIP),
    "ar_copo_unscaled": Method("AR-CoPO, unscaled step list", "toy", UNSCALED, COPO_CLIP),
    "sde_unscaled": Method("SDE-GRPO, shared initial noise, unscaled step list", "toy_sde_grpo", (SHARED, *UNSCALED), SDE_UNSCALED_CLIP),
    "caption_on": Method("caption reward alone, on-policy", "toy", (CAPTION_ONLY,), tuned_as="ar_copo"),
    "caption_semi": Method("caption reward alone, semi-on-policy", "toy", (CAPTION_ONLY,), STORED_CLIP, mode="semi_on_policy"),
    "caption_off": Method("caption reward alone, off-policy", "toy", (CAPTION_ONLY,), tuned_as="caption_semi", mode="off_policy"),
}
JUDGED, KINDS = ("ar_copo", "sde_shared"), ("White", "Smooth", "Rounded")


def judged_by(base: str, kind: str, level: float) -> str:
    """Return the name of a method that is trained by a judge that errs."""
    return f"{base}_{kind}_{level:g}" if level else f"{base}_exact"


def _judged(levels: Sequence[float]) -> dict[str, Method]:
    """Return the methods that are compared under judges: an exact one (level 0), and each kind that errs at each level."""
    found = {}
    for base in JUDGED:
        method = METHODS[base]
        weights = load_config(method.recipe).rewards
        found[judged_by(base, "", 0)] = replace(method, tuned_as=base)
        for kind, level in ((kind, level) for kind in KINDS for level in levels):
            judges = [(f"erring:{kind}:{name}_{amount:g}", weights[name] * bool(amount)) for name in EXACT for amount in (level, 0)]
            setting = "rewards={" + ", ".join(f'"{name}": {weight:g}' for name, weight in judges) + "}"
            title = f"{method.title}, {kind.lower()} error of {level:g}"
            found[judged_by(base, kind, level)] = replace(method, title=title, settings=(*method.settings, setting), tuned_as=base)
    return found


@dataclass(frozen=True)
class Part:
    """One step of the study.

    iterations: of each run. prompts, videos: of an evaluation, and of each prompt. pairs: of a sweep over learning rate and clip. groups:
    of a buffer. levels: of judges' errors. scales: of merges. draws: of the entropy study, which trains nothing.
    """

    name: str
    title: str
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    iterations: int = 100
    prompts: int = 64
    videos: int = 4
    pairs: int = 0
    groups: int = 100
    levels: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    draws: int = 0

    def known(self) -> dict[str, Method]:
        """Return the methods by name."""
        return _judged(self.levels) if self.levels else {name: METHODS[name] for name in self.methods}


SWEPT = tuple(name for name, method in METHODS.items() if not method.tuned_as)
SIX = (0, 1, 2, 3, 4, 5)
PARTS = {
    part.name: part
    for part in (
        Part("tune", "Learning rate and clip of each method", SWEPT, (100, 101), iterations=36, prompts=16, videos=2, pairs=5),
        Part("methods", "AR-CoPO and SDE-GRPO", ("ar_copo", "sde_shared", "sde_fresh"), SIX),
        Part("controls", "More baselines, and the unscaled list", ("neighbor", "ar_copo_unscaled", "sde_unscaled"), SIX),
        Part("published", "SDE-GRPO as published", ("sde_published",), SIX),
        Part("judges", "Judges that err", (), SIX[:4], iterations=28, prompts=24, videos=2, levels=LEVELS),
        Part(
            "caption",
            "The caption reward alone, and merging",
            ("caption_on", "caption_semi", "caption_off"),
            SIX,
            scales=(0, 0.25, 0.5, 0.75, 1),
        ),
        Part("entropy", "Which noise decides", ("ar_copo", "ar_copo_unscaled"), prompts=16, draws=2),
    )
}


def quick(part: Part) -> Part:
    """Return as little of a part as runs all of it."""
    iterations = 2 if part.levels else 1  # a judge with few grades may teach nothing in one, which ends a run
    less = replace(part, seeds=part.seeds[:1], iterations=iterations, prompts=1, videos=2, pairs=min(part.pairs, 1), groups=2)
    return replace(less, levels=part.levels[-1:], scales=part.scales[:1] + part.scales[-1:], draws=min(part.draws, 1))


# Runs ------------------------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A learning rate and a clip."""

    lr: float
    clip: float


class Run(NamedTuple):
    """One training run. settings: everything that its recipe is given, but for where it is written and where its buffer lies."""

    name: str
    method: str
    recipe: str
    seed: int
    pair: Pair
    mode: str
    settings: tuple[str, ...]


def runs(part: Part, chosen: Mapping[str, Pair]) -> list[Run]:
    """Return the part's training runs. chosen: the pair of each method that was swept; not needed for the sweep itself.

    Raises:
        UserError: a method was not swept.
    """
    found: list[Run] = []
    for name, method in part.known().items() if not part.draws else ():
        tuned_as = method.tuned_as or name
        if not part.pairs and tuned_as not in chosen:
            raise UserError(f"{part.name} trains {name} with what the sweep chose for {tuned_as}, which has no result; run --part tune")
        for pair in sweep(name)[: part.pairs] if part.pairs else [chosen[tuned_as]]:
            tag = f"{name}-lr{pair.lr:g}-clip{pair.clip:g}" if part.pairs else name
            for seed in part.seeds:
                settings = _settings(part, method, pair, seed)
                found.append(Run(f"{tag}-{seed}", name, method.recipe, seed, pair, method.mode, settings))
    return found


def sweep(name: str) -> list[Pair]:
    """Return the pairs that are tried for a method."""
    method = METHODS[name]
    lr = load_config(method.recipe).optimizer.lr
    return [Pair(float(f"{lr * faster:.3g}"), float(f"{method.clip * wider:.3g}")) for faster, wider in FACTORS]


def _settings(part: Part, method: Method, pair: Pair, seed: int) -> tuple[str, ...]:
    return (
        *method.settings,
        *(f"seed={seed}", f"optimizer.lr={pair.lr:g}", f"objective.clip={pair.clip:g}", f"train.mode={method.mode}"),
        *(f"train.iterations={part.iterations}", f"train.save_every={max(1, part.iterations // 4)}", "train.threads=1"),
        *evaluation(part),
        "run.tensorboard=false",
    )


def evaluation(part: Part, videos: int | None = None) -> tuple[str, ...]:
    """Return the settings of a part's evaluations."""
    numbers = {"prompts": part.prompts, "videos_per_prompt": videos or part.videos, "sample_videos": 0}
    return (*(f"evaluation.{name}={value}" for name, value in numbers.items()), "evaluation.filters=false", "evaluation.few_steps=false")


# Compute ---------------------------------------------------------------------------------------------------------------------------


class Compute(NamedTuple):
    """An iteration's work: videos that are judged, latent frames x denoising steps that are generated (mean over pivots) and replayed."""

    judged: float
    generated: float
    replayed: float


def compute(config: Config) -> Compute:
    """Return what a recipe's settings come to."""
    settings, size, steps = config.objective, config.rollout.group_size, len(config.sampler.steps)
    frames, chunks, groups = config.video.chunk_frames, config.video.chunks, config.rollout.prompts_per_iteration
    pivots = [config.rollout.pivot] if isinstance(config.rollout.pivot, int) else range(1, chunks + 1)
    made = sum((pivot - 1) + size * (chunks - pivot + 1) for pivot in pivots) / len(pivots)
    objective = objective_class(settings.kind)
    explored = objective.explored_chunks(settings) or sum(chunks - pivot + 1 for pivot in pivots) / len(pivots)
    replayed = explored * settings.updates * objective.samples_per_update(settings, steps, size)
    stored = config.train.mode != "on_policy"  # made once, before the run
    return Compute(0 if stored else groups * size, 0 if stored else groups * made * frames * steps, groups * replayed * frames)


def compute_of(method: Method) -> Compute:
    """Return what an iteration of a method comes to."""
    stored = () if method.mode == "on_policy" else (f"train.mode={method.mode}", "train.buffer=buffer")
    return compute(load_config(method.recipe, (*method.settings, *stored)))
