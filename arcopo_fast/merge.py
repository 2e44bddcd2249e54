"""Merge a semi-on-policy and an on-policy adapter into one: W + dW_semi + s dW_on.

    python -m arcopo_fast.merge --semi RUN --on RUN --scale 0.8 --out DIR
    python -m arcopo_fast.merge --semi RUN --on RUN --sweep 0,0.2,0.4,0.6,0.8,1 --out DIR [RECIPE] [key=value ...]

The merge is exact: B and A are concatenated along the rank (`model.lora.merge_adapters`). The sweep generates the same videos, by prompt
and noise, at every scale and with the base model, and chooses the scale by AR-CoPO's dual criterion: the largest at which the
in-domain score (the weighted sum of the rewards) and the out-of-domain score (the mean of the held-out metrics) are both above the base's.
It leaves

    DIR/  evaluations/{baseline,scale-S}.json   sweep.json  sweep.md  sweep.html   adapter/, of the chosen scale, if there is one

An evaluation is kept as soon as it is done; the same command goes on from there, also with other scales.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import JsonValue
from torch import Tensor

from arcopo_fast.build import build_engine, load_generator, load_held_out, load_prompts, load_rewards, video_shape
from arcopo_fast.cli import RecipeParser, adapter_path, numbers, run_command
from arcopo_fast.config.schema import Config
from arcopo_fast.data.prompts import Prompt, digest
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import evaluate, videos_at_once
from arcopo_fast.model.adapter_files import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, Adapter, read_adapter
from arcopo_fast.model.lora import add_lora, load_adapter_state, merge_adapters, write_adapter
from arcopo_fast.reports.model_card import HOW_TO_LOAD
from arcopo_fast.reports.results import Document, Summary, number, read_document
from arcopo_fast.reports.sweep import Point, Scores, as_json, as_markdown, as_page, choose_scale, point_of, scale_text, with_held_out
from arcopo_fast.runtime.console import Interrupted, Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.storage.atomic import atomic_write, check_out, remove_directory, settle
from arcopo_fast.storage.identity import describe, file_digest, require_same
from arcopo_fast.storage.locks import LOCK, owned
from arcopo_fast.storage.metrics import TOTAL
from arcopo_fast.storage.textfiles import read_json

MERGE = "merge.json"  # what an adapter was merged from; marks a directory that a merge may replace
ADAPTER = "adapter"  # the adapter's directory in that of a run or a sweep


class Source(NamedTuple):
    """One of the two adapters. file: its weights; base_model: what its configuration names, if it names one."""

    file: Path
    sha256: str
    adapter: Adapter
    base_model: str | None

    def summary(self) -> dict[str, Any]:
        return {"file": str(self.file), "sha256": self.sha256, "rank": self.adapter.rank, "alpha": self.adapter.alpha}


# Merging ---------------------------------------------------------------------------------------------------------------------------


def read_source(path: Path) -> Source:
    """The adapter of a run directory, an adapter directory or a file.

    Raises:
        UserError: `read_adapter`'s.
    """
    directory = path / ADAPTER if (path / ADAPTER).is_dir() else path
    file = next((directory / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (directory / name).is_file()), directory)
    adapter = read_adapter(file)
    config = read_json(file.with_name(PEFT_CONFIG)) if file.name == PEFT_WEIGHTS else {}
    base_model = config.get("base_model_name_or_path")
    return Source(file, file_digest(file), adapter, base_model if isinstance(base_model, str) else None)


def read_pair(semi: Path, on: Path) -> tuple[Source, Source]:
    """Both adapters; says so if they name different base models. Paths differ between machines, so that is not refused."""
    pair = read_source(semi), read_source(on)
    bases = _base_models(*pair)
    if len(bases) > 1:
        print(f"the adapters name different base models, {' and '.join(bases)}: make sure that these are the same weights", file=sys.stderr)
    return pair


def _base_models(semi: Source, on: Source) -> list[str]:
    return sorted({one.base_model for one in (semi, on) if one.base_model})


def merge(semi: Source, on: Source, scale: float, out: Path, *, overwrite: bool = False) -> None:
    """Write the merged adapter to `out`, complete or not at all.

    Args:
        overwrite: replace an earlier merge in `out`.

    Raises:
        UserError: the adapters are not of one base model, or `out` cannot be written or holds something else.
    """
    check_out(out)
    if _occupied(out):
        if not (out / MERGE).is_file():
            raise UserError(f"{out} holds something else than a merged adapter (it has no {MERGE}); give another --out")
        if not overwrite:
            raise UserError(f"{out} holds a merged adapter already; give another --out, or replace it with --overwrite")
    write_merged(out, semi, on, scale)


def write_merged(directory: Path, semi: Source, on: Source, scale: float, *, results: str = "") -> None:
    """The adapter in both forms, its model card and `merge.json`, in the place of what `directory` held. results: for the card."""
    merged = merge_adapters(semi.adapter, on.adapter, scale)
    bases = _base_models(semi, on)
    base_model = bases[0] if len(bases) == 1 else None
    record = {"semi": semi.summary(), "on": on.summary(), "scale": scale}
    more = {MERGE: json.dumps(record, indent=2) + "\n", "README.md": model_card(semi, on, scale, base_model, results)}
    write_adapter(directory, merged, base_model=base_model, more=more)


def model_card(semi: Source, on: Source, scale: float, base_model: str | None, results: str = "") -> str:
    """README.md of a merged adapter. results: the sweep that chose it, as Markdown."""
    base = {"base_model": base_model} if base_model else {}
    header = yaml.safe_dump({"library_name": "peft", **base, "tags": ["text-to-video", "lora", "ar-copo"]}, sort_keys=False)
    rows = "\n".join(
        f"| {kind} | {factor:g} | {one.adapter.rank} | {one.adapter.alpha:g} | {one.file} | `{one.sha256}` |"
        for kind, factor, one in (("semi-on-policy", 1.0, semi), ("on-policy", scale, on))
    )
    chosen = f"\n## How the scale was chosen\n\n{results}" if results else ""
    return f"""---
{header}---

# Merged adapter, scale {scale_text(scale)}

Two LoRA adapters in one: W + dW_semi + {scale_text(scale)} dW_on, the merge of AR-CoPO (arXiv 2603.17461), by arcopo_fast. It is exact:
B and A are concatenated along the rank, {semi.adapter.rank} + {on.adapter.rank}.

| adapter | scale | rank | alpha | file | SHA-256 |
|---|---|---|---|---|---|
{rows}
{chosen}
{HOW_TO_LOAD}"""


def _occupied(out: Path) -> bool:
    return out.exists() and any(out.iterdir())


class _Kept(Document):
    """An evaluation of a sweep in its file."""

    settings: dict[str, JsonValue]
    scores: dict[str, Summary]


# The sweep -------------------------------------------------------------------------------------------------------------------------


def sweep(
    config: Config,
    semi: Source,
    on: Source,
    scales: Sequence[float],
    out: Path,
    *,
    held_out: Sequence[str] = (),
    overwrite: bool = False,
) -> Point | None:
    """Evaluate the base model, the semi-on-policy adapter alone (scale 0) and every scale; returns the chosen one.

    Args:
        config: generator, prompts, noises and rewards of the evaluation.
        out: see the module's docstring; an earlier sweep with the same adapters and settings is gone on with.
        held_out: names of the scores whose mean is the out-of-domain score; none: every held-out metric.
        overwrite: begin anew where `out` holds an earlier sweep.

    Raises:
        UserError: the adapters do not fit the generator, `out` holds something else, or nothing is held out.
    """
    check_out(out)
    wanted: list[float | None] = [None, *sorted({0.0, *scales})]
    with owned(out):
        settle(out, f"sweep|{ADAPTER}", owned=True)
        settle(evaluation_file(out, None).parent, "baseline|scale-.+", owned=True)
        evaluations, names = evaluate_scales(config, semi, on, wanted, out, held_out=held_out, overwrite=overwrite)
        return judge(config, semi, on, {scale: with_held_out(evaluations[scale], names) for scale in wanted}, names, out)


def evaluate_scales(
    config: Config,
    semi: Source,
    on: Source,
    wanted: Sequence[float | None],
    out: Path,
    *,
    held_out: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[dict[float | None, Scores], list[str]]:
    """The scores at each scale, the base model's under None, and the names of those that are out of domain; what is in `out` is kept."""
    rewards, prompts = load_rewards(config), load_prompts(config).evaluation
    settings = settings_of(config, semi, on, prompts)
    kept = kept_evaluations(out, wanted, settings, overwrite=overwrite)

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    generator = load_generator(config)
    metrics = load_held_out(generator)
    names = out_of_domain(config, list(metrics), held_out)
    check_complete(out, kept, [TOTAL, *rewards, *metrics])
    model, shape = generator.model, video_shape(config, generator)
    merged = merge_adapters(semi.adapter, on.adapter, 1.0)
    add_lora(model, rank=merged.rank, alpha=merged.alpha, targets=merged.modules, seed=0)
    load_adapter_state(model, merged.state, source=f"the merge of {semi.file} and {on.file}")
    engine = build_engine(config, model, shape, videos=videos_at_once(config, shape), vae=generator.decoder.vae)

    if overwrite:
        _remove_sweep(out)
    remaining = [scale for scale in wanted if scale not in kept]
    if kept:
        print(f"{len(kept)} of {len(wanted)} evaluations are there already", file=sys.stderr)
    try:
        with Progress(len(remaining)) as progress:
            for scale in remaining:
                load_adapter_state(model, adapter_at(semi, on, scale))
                scores = evaluate(config, generator, engine, prompts, rewards, metrics).summary()
                file = evaluation_file(out, scale)
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(file, json.dumps({"scale": scale, "settings": settings, "scores": scores}, indent=2) + "\n")
                kept[scale] = scores
                progress.update(number(scores[TOTAL]["mean"]))
    except KeyboardInterrupt:
        option = ", without --overwrite" * (overwrite and None in kept)
        raise Interrupted(f"{len(kept)} of {len(wanted)} evaluations are kept; the same command goes on{option}") from None
    return kept, names


def judge(
    config: Config, semi: Source, on: Source, evaluations: Mapping[float | None, Scores], names: Sequence[str], out: Path
) -> Point | None:
    """Apply the criterion and write what comes of it; returns the chosen scale.

    evaluations: HELD_OUT included, by scale, the base model's under None. names: what HELD_OUT is the mean of.
    """
    baseline = evaluations[None]
    points = [point_of(config, scale, baseline, scores) for scale, scores in evaluations.items() if scale is not None]
    chosen = choose_scale(points)
    markdown = as_markdown(points, chosen, names)
    if chosen:
        write_merged(out / ADAPTER, semi, on, chosen.scale, results=markdown)
    elif (out / ADAPTER / MERGE).is_file():  # of other scales or metrics
        remove_directory(out / ADAPTER)
    adapters = {"semi-on-policy": semi.summary(), "on-policy": on.summary()}
    document = {
        "adapters": adapters,
        "in_domain": TOTAL,
        "out_of_domain": names,
        "baseline": baseline,
        "scales": [as_json(point, evaluations[point.scale]) for point in points],
        "chosen": chosen.scale if chosen else None,
    }
    atomic_write(out / "sweep.md", f"# Merge sweep\n\n{markdown}")
    atomic_write(out / "sweep.html", as_page(config, adapters, points, chosen, names))
    atomic_write(out / "sweep.json", json.dumps(document, indent=2) + "\n")
    print(markdown)
    return chosen


def adapter_at(semi: Source, on: Source, scale: float | None) -> dict[str, Tensor]:
    """The merged tensors at a scale; zeros for the base model, None.

    Not a disabled adapter, though both add exactly nothing: CUDA graphs that the engine captured without the adapter's operations would be
    replayed with it.
    """
    state = merge_adapters(semi.adapter, on.adapter, scale or 0.0).state
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()} if scale is None else state


def settings_of(config: Config, semi: Source, on: Source, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What the numbers of an evaluation depend on, by dotted keys."""
    adapters = {"semi": semi.summary(), "on": on.summary()}
    sections = {"seed", "prompts", "generator", "video", "sampler", "cache", "rewards", "evaluation"}
    settings = describe(adapters | config.model_dump(mode="json", include=sections) | {"prompts.sha256": digest(prompts)})
    return {name: value for name, value in settings.items() if name not in ("semi.file", "on.file")}  # the same file may have moved


def evaluation_file(out: Path, scale: float | None) -> Path:
    """None: the base model's."""
    return out / "evaluations" / ("baseline.json" if scale is None else f"scale-{scale_text(scale)}.json")


def kept_evaluations(
    out: Path, wanted: Sequence[float | None], settings: Mapping[str, Any], *, overwrite: bool = False
) -> dict[float | None, Scores]:
    """The evaluations of an earlier sweep in `out`, by scale; none with `overwrite`.

    Raises:
        UserError: `out` holds something else, or a sweep with other adapters or settings.
    """
    # Empty folders are of a sweep that ended before its first evaluation.
    if any(entry.is_file() and entry.name != LOCK for entry in out.rglob("*")) and not evaluation_file(out, None).is_file():
        raise UserError(f"{out} holds something else than a sweep (it has no evaluations/baseline.json); give another --out")
    kept: dict[float | None, Scores] = {}
    for scale in wanted if not overwrite else ():
        file = evaluation_file(out, scale)
        if not file.is_file():
            continue
        record = read_document(file, _Kept, "an evaluation of a sweep")
        advice = "give another --out, or begin anew with --overwrite"
        require_same(f"{out} holds a sweep with other settings", record.settings, settings, advice)
        kept[scale] = {name: summary.model_dump() for name, summary in record.scores.items()}
    return kept


def check_complete(out: Path, kept: Mapping[float | None, Scores], names: Sequence[str]) -> None:
    """Raise `UserError` if an evaluation lacks one of these scores, or a score has other numbers of videos than the rest."""
    videos = {len(scores[name]["values"]) for scores in kept.values() for name in names if name in scores}
    for scale, scores in kept.items():
        absent = [name for name in names if name not in scores or len(scores[name]["values"]) != max(videos)]
        if absent:
            file = evaluation_file(out, scale)
            raise UserError(f"{file} lacks {absent[0]}, or the score of some videos; remove it to have it made again")


def _remove_sweep(out: Path) -> None:
    """What `sweep` has written, but for the base model's evaluation: that is replaced first, and until then says what `out` is."""
    if (out / ADAPTER / MERGE).is_file():
        remove_directory(out / ADAPTER)
    for file in (*(out / f"sweep.{kind}" for kind in ("json", "md", "html")), *evaluation_file(out, None).parent.glob("scale-*.json")):
        file.unlink(missing_ok=True)


def out_of_domain(config: Config, metrics: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The names of the scores that make up the out-of-domain score: `chosen`, or else every held-out metric.

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


# The command -----------------------------------------------------------------------------------------------------------------------


def command_line() -> RecipeParser:
    prog = "python -m arcopo_fast.merge"
    parser = RecipeParser(
        prog,
        "Merge a semi-on-policy and an on-policy adapter, W + dW_semi + s dW_on: at one scale, or at the best of several. A recipe and "
        "settings say how --sweep evaluates.",
        default="the config.yaml of the --on run",
    )
    parser.usage = f"{prog} --semi PATH --on PATH (--scale S | --sweep S,S,...) --out DIR [recipe] [key.sub=value ...] [options]"
    where = "a run's directory, an adapter's directory or a file of weights"
    whole = f"the semi-on-policy adapter, taken whole: {where}"
    parser.add_argument("--semi", type=adapter_path, required=True, metavar="PATH", help=whole)
    parser.add_argument("--on", type=adapter_path, required=True, metavar="PATH", help="the on-policy adapter, which is scaled: the same")
    scales = parser.add_mutually_exclusive_group(required=True)
    scales.add_argument("--scale", type=numbers, metavar="S", help="s of dW_semi + s dW_on; the paper: 0.8 for Self-Forcing")
    scales.add_argument(
        "--sweep",
        type=numbers,
        metavar="S,S,...",
        help="evaluate the base model, scale 0 (the semi-on-policy adapter alone) and these scales on the same prompts and noises, and "
        "merge at the largest at which in-domain and out-of-domain score are both above the base model's",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the adapter, or all that a sweep leaves, is written")
    parser.add_argument(
        "--held-out",
        type=lambda text: tuple(filter(None, text.split(","))),
        metavar="NAME,...",
        default=(),
        help="with --sweep: the metrics whose mean is the out-of-domain score (default: all that the generator's world has)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge, or begin an earlier sweep anew")
    return parser


def main(argv: list[str]) -> None:
    parser = command_line()
    options = parser.read(argv)
    if options is None:
        return
    if options.scale is not None:
        if len(options.scale) > 1:
            raise UserError("--scale takes one number; give several to --sweep")
        if options.settings or options.held_out or options.print_config:
            raise UserError("--scale evaluates nothing: a recipe, settings, --held-out and --print-config go with --sweep; leave them out")
        semi, on = read_pair(options.semi, options.on)
        merge(semi, on, options.scale[0], options.out, overwrite=options.overwrite)
        print(f"adapter: {options.out}")
        return
    command = parser.read_config(argv, run_of=on_policy_run)
    if command is None:
        return
    config, _ = command
    tune_for_cpu()
    semi, on = read_pair(options.semi, options.on)
    chosen = sweep(config, semi, on, options.sweep, options.out, held_out=options.held_out, overwrite=options.overwrite)
    print(f"report: {options.out / 'sweep.html'}")
    if chosen:
        print(f"adapter: {options.out / ADAPTER}")


def on_policy_run(options: Any) -> Path:
    """Whose recipe a sweep evaluates by, where the command line names none."""
    if not (options.on / "config.yaml").is_file():
        raise UserError(f"{options.on} is not a run's directory (it has no config.yaml), so name the recipe by which the sweep evaluates")
    return options.on


if __name__ == "__main__":
    sys.exit(run_command(main))
