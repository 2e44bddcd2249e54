"""The end of a run: its adapter, samples and evaluation, or how to go on with it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

from arcopo_fast.config.schema import Config
from arcopo_fast.evaluation.baselines import FILTERED, Baseline, baselines
from arcopo_fast.evaluation.changes import Change, changes
from arcopo_fast.evaluation.few_steps import FEW_STEPS, alarms, step_changes
from arcopo_fast.evaluation.judging import Evaluation, summary
from arcopo_fast.evaluation.sharpness import as_document
from arcopo_fast.model.lora import save_adapter
from arcopo_fast.reports.model_card import model_card
from arcopo_fast.runtime.place import launcher
from arcopo_fast.storage.metrics import TOTAL
from arcopo_fast.storage.run_dir import RunDirectory, step_of
from arcopo_fast.storage.video import write_mp4
from arcopo_fast.training.trainer import Trainer


def finish(trainer: Trainer, run: RunDirectory, before: Evaluation) -> None:
    """Evaluate, and, on rank 0, write the run's adapter, samples and evaluation. evaluation.json is the last: with it the run is complete
    but for its report."""
    config, after = trainer.config, trainer.evaluate()
    if not trainer.world.is_main:
        return
    document: dict[str, Any] = {
        "before": summary(before.scores | before.looks),
        "after": summary(after.scores | after.looks),
        "videos": write_samples(run, config, before, after),
    }
    if before.filtered:
        document[FILTERED] = {name: summary(scores) for name, scores in before.filtered.items()}
    if before.few_steps:
        document[FEW_STEPS] = as_document(before.few_steps, after.few_steps)
    card = {"README.md": model_card(config, document)}
    with trainer.objective.policies.as_(trainer.objective.evaluated):
        save_adapter(run.path / "adapter", trainer.generator.model, base_model=config.generator.checkpoint, more=card)
    run.write("evaluation.json", json.dumps(document, indent=2) + "\n")
    print(comparison(changes(config, document), len(before.prompts)))
    print(without_learning(baselines(config, document)), end="")
    for alarm in alarms(step_changes(document)):
        warnings.warn(f"{alarm}; see the report", stacklevel=2)


def write_samples(run: RunDirectory, config: Config, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """Write the first evaluation videos as mp4, before and after, the same prompt and noise side by side."""
    videos = []
    (run.path / "samples").mkdir(exist_ok=True)  # an empty directory is lost where runs are kept by tools that know files only
    for index in range(len(before.frames)):
        entry: dict[str, Any] = {"prompt": before.prompts[index], "seed": index}
        for name, evaluation in (("before", before), ("after", after)):
            entry[name] = f"samples/{name}-{index:02d}.mp4"
            write_mp4(run.path / entry[name], evaluation.frames[index], config.video.fps)
            reward = evaluation.scores[TOTAL][index].item()
            entry[f"reward_{name}"] = reward if math.isfinite(reward) else None
        videos.append(entry)
    return videos


def comparison(changes: Sequence[Change], videos: int) -> str:
    """Return the table that ends a run: each reward and held-out metric before and after, the change also in standard deviations."""
    width = max(len(change.name) for change in changes) + 2
    lines = [f"{'':{width}}  before   after  change  in std of a video"]
    for change in changes:
        label = f"({change.name})" if change.kind == "held out" else change.name
        in_spreads = f"{change.in_spreads:+6.2f}" if math.isfinite(change.in_spreads) else "     -"
        left_out = f"  {change.failed} left out: no score" if change.failed else ""
        lines.append(f"{label:{width}}  {change.before:6.3f}  {change.after:6.3f}  {change.change:+6.3f}  {in_spreads}{left_out}")
    return "\n".join([*lines, f"{videos} videos on fixed prompts and noises; metrics in (brackets) are never trained on"])


def without_learning(found: Sequence[Baseline]) -> str:
    """Return a line on what is had without learning: the best filter and the best of several videos; empty where nothing was tried."""
    best = max((each for each in found if each.filter and each.gain), key=lambda each: each.gain.change if each.gain else 0, default=None)
    shown = [*([best] if best else []), *(each for each in found if not each.filter)]
    gains = [(each.name, each.gain.in_spreads) for each in shown if each.gain and math.isfinite(each.gain.in_spreads)]
    names = [f"{'the best filter, ' * (best is not None and name == best.name)}{name}: {gain:+.2f}" for name, gain in gains]
    return f"without learning, in std of a video: {'; '.join(names)}\n" if names else ""


def how_to_go_on(run: RunDirectory | None) -> str:
    """Return what is checkpoints of a run that ends early, and the command that goes on with it."""
    if run is None:
        return "nothing was begun; the same command starts it"
    if run.evaluated:
        return f"{run.path} is complete but for its report; write that with python -m arcopo_fast.report {run.path}"
    checkpoints = run.checkpoints()
    stand = f"iterations up to {step_of(checkpoints[-1])} are kept" if checkpoints else "its settings are kept"
    return f"{stand}; {resumption(run)}"


def resumption(run: RunDirectory) -> str:
    """Return how to go on with a run."""
    return f"continue with {launcher()} -m arcopo_fast.train --resume {run.path}"
