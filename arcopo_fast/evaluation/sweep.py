"""The scale of a merge, W + dW_semi + s dW_on: evaluated at several on the same videos, and chosen by AR-CoPO's dual criterion.

Chosen is the largest scale at which the in-domain score (the weighted sum of the rewards) and the out-of-domain score (the mean of the
held-out metrics, each in standard deviations of the base model's videos) are both above the base model's. Every evaluation is kept in a
file of its own, so that a sweep can go on.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue

from arcopo_fast.build import build_engine, load_generator, load_held_out, load_prompts, load_rewards
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt, digest
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.adapters import Pair, scale_text
from arcopo_fast.evaluation.changes import Change, Summary, changes
from arcopo_fast.evaluation.judging import evaluate, videos_at_once
from arcopo_fast.model.lora import add_lora, load_adapter_state, set_adapter
from arcopo_fast.runtime.console import Interrupted, Progress
from arcopo_fast.storage.atomic import atomic_write, remove_directory, settle
from arcopo_fast.storage.identity import describe, require_same
from arcopo_fast.storage.locks import LOCK
from arcopo_fast.storage.metrics import TOTAL, number
from arcopo_fast.storage.textfiles import Document, read_document

ADAPTER = "adapter"  # the adapter's directory in that of a run or a sweep
MERGE = "merge.json"  # what an adapter was merged from; marks a directory that a merge may replace
HELD_OUT = "held_out"  # the out-of-domain score, beside the scores of an evaluation

Summaries = Mapping[str, Mapping[str, Any]]
"""An evaluation: mean, std and one value for each video, by the score's name."""


class _Kept(Document):
    """An evaluation of a sweep in its file."""

    settings: dict[str, JsonValue]
    scores: dict[str, Summary]


# The criterion ---------------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One scale of a sweep. scores: every score against the base model's, TOTAL and HELD_OUT included."""

    scale: float
    scores: dict[str, Change]

    @property
    def both_above(self) -> bool:
        """Equal is not above, and neither is NaN."""
        return all(self.scores[name].change > 0 for name in (TOTAL, HELD_OUT))


def choose_scale(points: Sequence[Point]) -> Point | None:
    """Return, by the dual criterion, the largest scale at which both scores' means are above the base model's; None if there is none."""
    return max((point for point in points if point.both_above), key=lambda point: point.scale, default=None)


def with_held_out(scores: Summaries, names: Sequence[str], baseline: Summaries) -> dict[str, Mapping[str, Any]]:
    """Return an evaluation's scores with one more, HELD_OUT: for each video the mean of the named ones.

    Each is the distance from the baseline's mean in standard deviations of the baseline's videos (plainly where those do not vary), so that
    a metric does not count for more because its numbers are larger.
    """
    units = [(baseline[name]["mean"] or 0.0, baseline[name]["std"] or 1.0) for name in names]
    of_videos = zip(*(scores[name]["values"] for name in names), strict=True)
    values = [
        None if None in of_video else statistics.fmean((value - mean) / std for value, (mean, std) in zip(of_video, units, strict=True))
        for of_video in of_videos
    ]
    known = [value for value in values if value is not None]
    mean, std = (statistics.fmean(known), statistics.pstdev(known)) if known else (None, None)
    return {**scores, HELD_OUT: {"mean": mean, "std": std, "values": values}}


def point_of(config: Config, scale: float, baseline: Summaries, scores: Summaries) -> Point:
    """Return every score of one scale against the base model's, with the standard error of the videos' differences."""
    return Point(scale, {change.name: change for change in changes(config, {"before": baseline, "after": scores})})


class Sweep(NamedTuple):
    """A sweep that is judged. names: the scores that HELD_OUT is the mean of. evaluations: by scale, the base model's under None."""

    pair: Pair
    names: Sequence[str]
    evaluations: Mapping[float | None, Summaries]
    points: Sequence[Point]
    chosen: Point | None

    @classmethod
    def judged(cls, config: Config, pair: Pair, evaluations: Mapping[float | None, Summaries], names: Sequence[str]) -> Sweep:
        """Return the sweep of judged scales; None among the evaluations is the generator without the on-policy adapter."""
        with_metrics = {scale: with_held_out(scores, names, evaluations[None]) for scale, scores in evaluations.items()}
        points = [point_of(config, scale, with_metrics[None], scores) for scale, scores in with_metrics.items() if scale is not None]
        return cls(pair, names, with_metrics, points, choose_scale(points))


def out_of_domain(config: Config, metrics: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Return the names of the scores that make up the out-of-domain score: `chosen`, or else every held-out metric.

    Raises:
        UserError: there is none, or a name that is not held out.
    """
    known = [*metrics, *(name for name, weight in config.rewards.items() if not weight)]
    if strangers := [name for name in chosen if name not in known]:
        trained = f"the recipe trains on {strangers[0]}" if strangers[0] in config.rewards else f"there is no score {strangers[0]!r}"
        raise UserError(f"--held-out: {trained}; what is held out here: {', '.join(known) or 'nothing'}")
    if not (chosen or metrics):
        advice = "name rewards of weight 0 with --held-out" if known else "add a reward of weight 0 and name it with --held-out"
        raise UserError(f"{config.generator.checkpoint} has no held-out metrics, and the criterion needs one; {advice}")
    return list(dict.fromkeys(chosen or metrics))


# The evaluations -------------------------------------------------------------------------------------------------------------------


def sweep(
    config: Config, pair: Pair, scales: Sequence[float], out: Path, *, held_out: Sequence[str] = (), overwrite: bool = False
) -> Sweep:
    """Evaluate the base model, the semi-on-policy adapter alone (scale 0) and every scale, and judge them.

    Args:
        config: generator, prompts, noises and rewards of the evaluation.
        out: this process owns it; an earlier sweep with the same adapters and settings is gone on with.
        held_out: names of the scores whose mean is the out-of-domain score, see `with_held_out`; none: every held-out metric.
        overwrite: begin anew where `out` holds an earlier sweep.

    Raises:
        UserError: the adapters do not fit the generator, `out` holds something else, or nothing is held out.
        Interrupted: the user asked to stop; what is evaluated is kept.
    """
    wanted: list[float | None] = [None, *sorted({0.0, *scales})]
    settle(out, f"sweep|{ADAPTER}", owned=True)
    settle(evaluation_file(out, None).parent, "baseline|scale-.+", owned=True)
    rewards, prompts = load_rewards(config), load_prompts(config).evaluation
    settings = settings_of(config, pair, prompts)
    kept = kept_evaluations(out, () if overwrite else wanted, settings)
    generator = load_generator(config)
    metrics = load_held_out(generator)
    names = out_of_domain(config, list(metrics), held_out)
    check_complete(out, kept, [TOTAL, *rewards, *metrics])
    model = generator.model
    merged = pair.merged(1.0)
    add_lora(model, rank=merged.rank, alpha=merged.alpha, targets=merged.modules, seed=0)
    load_adapter_state(model, merged.state, source=f"the merge of {pair.semi.file} and {pair.on.file}")
    engine = build_engine(config, model, videos=videos_at_once(config), vae=generator.decoder.vae)

    if overwrite:
        _remove_sweep(out)
    remaining = [scale for scale in wanted if scale not in kept]
    if kept:
        print(f"{len(kept)} of {len(wanted)} evaluations are there already", file=sys.stderr)
    try:
        with Progress(len(remaining)) as progress:
            for scale in remaining:
                set_adapter(model, None if scale is None else pair.merged(scale))
                scores = evaluate(config, generator, engine, prompts, rewards, metrics).summary()
                _keep(out, scale, settings, scores)
                kept[scale] = scores
                progress.update(number(scores[TOTAL]["mean"]))
    except KeyboardInterrupt:
        option = ", without --overwrite" * (overwrite and None in kept)
        raise Interrupted(f"{len(kept)} of {len(wanted)} evaluations are kept; the same command continues{option}") from None
    return Sweep.judged(config, pair, {scale: kept[scale] for scale in wanted}, names)


def _keep(out: Path, scale: float | None, settings: Mapping[str, Any], scores: Summaries) -> None:
    file = evaluation_file(out, scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps({"scale": scale, "settings": settings, "scores": scores}, indent=2) + "\n")


def settings_of(config: Config, pair: Pair, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return what the numbers of an evaluation depend on, by dotted keys."""
    adapters = {name: source.summary() for name, source in pair._asdict().items()}
    sections = {"seed", "prompts", "generator", "video", "sampler", "cache", "rewards", "evaluation"}
    without = {"generator": {"shard"}, "evaluation": {"filters", "few_steps"}}  # on which no number depends
    made_with = config.model_dump(mode="json", include=sections, exclude=without)
    settings = describe(adapters | made_with | {"prompts.sha256": digest(prompts)})
    return {name: value for name, value in settings.items() if name not in ("semi.file", "on.file")}  # the same file may have moved


def evaluation_file(out: Path, scale: float | None) -> Path:
    """Return the file of a scale's evaluation, of the base model's for None."""
    return out / "evaluations" / ("baseline.json" if scale is None else f"scale-{scale_text(scale)}.json")


def kept_evaluations(out: Path, wanted: Sequence[float | None], settings: Mapping[str, Any]) -> dict[float | None, Summaries]:
    """Return the wanted evaluations of an earlier sweep in `out`, by scale.

    Raises:
        UserError: `out` holds something else, or a sweep with other adapters or settings.
    """
    # Empty folders are of a sweep that ended before its first evaluation.
    if any(entry.is_file() and entry.name != LOCK for entry in out.rglob("*")) and not evaluation_file(out, None).is_file():
        raise UserError(f"{out} holds something else than a sweep (it has no evaluations/baseline.json); give another --out")
    kept: dict[float | None, Summaries] = {}
    for scale in wanted:
        file = evaluation_file(out, scale)
        if not file.is_file():
            continue
        record = read_document(file, _Kept, "an evaluation of a sweep")
        advice = "give another --out, or start again with --overwrite"
        require_same(f"{out} holds a sweep with other settings", record.settings, settings, advice)
        kept[scale] = {name: summary.model_dump() for name, summary in record.scores.items()}
    return kept


def check_complete(out: Path, kept: Mapping[float | None, Summaries], names: Sequence[str]) -> None:
    """Raise `UserError` if an evaluation lacks one of these scores, or a score has other numbers of videos than the rest."""
    videos = {len(scores[name]["values"]) for scores in kept.values() for name in names if name in scores}
    for scale, scores in kept.items():
        absent = [name for name in names if name not in scores or len(scores[name]["values"]) != max(videos)]
        if absent:
            file = evaluation_file(out, scale)
            raise UserError(f"{file} lacks {absent[0]}, or the score of some videos; remove it to have it made again")


def _remove_sweep(out: Path) -> None:
    """Remove what `sweep` has written, but for the base model's evaluation: that is replaced first, and until then says what `out` is."""
    if (out / ADAPTER / MERGE).is_file():
        remove_directory(out / ADAPTER)
    for file in (*(out / f"sweep.{kind}" for kind in ("json", "md", "html")), *evaluation_file(out, None).parent.glob("scale-*.json")):
        file.unlink(missing_ok=True)
