"""Align a generator with AR-CoPO.

    python -m arcopo_fast.train [RECIPE] [key=value ...] [--mode M --buffer DIR] [--dry-run] [--profile N]
    python -m arcopo_fast.train --resume RUN

One iteration, top to bottom: groups of videos that differ in one chunk's noise, with their rewards (rolled out and judged, or from a
buffer), advantages, update of the LoRA adapter. Everything a run makes lies in its run directory.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.build import (
    Generator,
    build_engine,
    build_objective,
    encode_ahead,
    load_generator,
    load_held_out,
    load_prompts,
    load_rewards,
)
from arcopo_fast.cli import RecipeParser, numbers, positive_int, run_command
from arcopo_fast.config.reading import setting
from arcopo_fast.config.schema import Config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.data.prompts import digest
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.changes import Change, changes
from arcopo_fast.evaluation.judging import Evaluation, evaluate
from arcopo_fast.model.lora import adapter_disabled, adapter_parameters, add_lora, load_adapter, save_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.objectives.advantage import group_advantages, weighted_total, zscore
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.planning.ceilings import measure_ceilings
from arcopo_fast.planning.plan import dry_run, over_plan
from arcopo_fast.planning.work import floors
from arcopo_fast.reports.model_card import model_card
from arcopo_fast.reports.results import DEVICE
from arcopo_fast.reports.run import write_report
from arcopo_fast.reports.stall import PATIENCE, notice, stalled_since
from arcopo_fast.rewards.base import Reward, RewardError
from arcopo_fast.rollout.engine import Engine, Group
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.runtime.profiling import Trace
from arcopo_fast.storage.identity import check_inputs, check_settings, sampled_digest, version_of
from arcopo_fast.storage.metrics import TOTAL, MetricsWriter
from arcopo_fast.storage.run_dir import RunDirectory, step_of
from arcopo_fast.storage.video import write_mp4
from arcopo_fast.training.groups import BufferedGroups, GroupSource, JudgedGroup, Rollouts, policy_of, training_prompts


def check_trainable(config: Config) -> None:
    """Raises UserError for what can generate videos, but cannot be trained."""
    if config.generator.dtype == "float16":
        raise UserError(
            "generator.dtype=float16 cannot be trained: the gradient of one latent's element is about 4e-8, below what float16 holds; "
            "use generator.dtype=bfloat16, or float32"
        )


UNSCORED = 3
"""Iterations in a row without one score that end a run: of one, its prompts alone may be to blame."""
ALIKE = 10
"""Iterations in a row without a group whose members differ that end a run: scores in whole numbers may agree by chance for a while."""


class Trainer:
    """What a run trains and with what: the generator with its adapter, the source of groups, the objective, the optimiser."""

    def __init__(self, config: Config) -> None:
        check_trainable(config)
        self.config = config
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.rewards: dict[str, Reward] = load_rewards(config)
        self.prompts = load_prompts(config)
        self.generator: Generator = load_generator(config)
        ahead = [*training_prompts(config, self.prompts.training), *self.prompts.evaluation]
        encode_ahead(self.generator.encode_text, (prompt.for_generator for prompt in ahead))
        self.held_out = load_held_out(self.generator)
        self.engine: Engine = build_engine(config, self.generator.model, vae=self.generator.decoder.vae)
        self.shape = self.engine.shape
        self.objective = build_objective(config, self.engine)
        self.source: GroupSource
        if config.train.buffer is None:
            self.source = Rollouts(config, self.generator, self.engine, self.objective, self.prompts, self.rewards)
        else:
            buffer = Buffer.open(config.train.buffer, policy_of(config, self.generator, self.objective))
            self.source = BufferedGroups(config, self.generator, self.engine, self.objective, buffer)
        self.made_of = self._made_of()
        self.judges = {name: judge.fingerprint(name) for name, judge in {**self.rewards, **self.held_out}.items()}
        lora = config.lora
        add_lora(self.generator.model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
        self.parameters = adapter_parameters(self.generator.model)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
        self.stepper = Stepper(
            self.optimizer, eps=optimizer.eps, gradient_clip=optimizer.gradient_clip, relative_clip=optimizer.relative_clip
        )
        self.stepped = False  # in the iteration at hand: the weights are no longer those of the one before
        self.optimizer.register_step_pre_hook(self._steps)
        self.unscored = self.alike = 0  # iterations in a row without one score, and without a group whose members differ

    def _made_of(self) -> dict[str, str]:
        """What every video depends on, see `check_inputs`. The generator has no adapter yet."""
        generator = self.generator
        return {
            "transformer": sampled_digest(generator.model.state_dict().items()),
            "VAE": sampled_digest(generator.decoder.vae.state_dict().items()),
            "text encoder": generator.encode_text.fingerprint,
            "set of prompts": digest([*self.prompts.training, *self.prompts.evaluation]),
        }

    def _steps(self, *unused: Any) -> None:
        self.stepped = True

    def evaluate(self) -> Evaluation:
        return evaluate(self.config, self.generator, self.engine, self.prompts.evaluation, self.rewards, self.held_out)

    def advantages(self, judged: JudgedGroup) -> Tensor:
        """A_i of a group's members [G] float64."""
        objective = self.config.objective
        return group_advantages(
            judged.rewards,
            self.config.rewards,
            combine=objective.reward_combine,
            kind=objective.advantage,
            p=objective.quasi_norm_p,
            std_floor=objective.advantage_std_floor,
            std=objective.advantage_std,
            largest=objective.advantage_max,
        )

    def set_learning_rate(self, iteration: int) -> float:
        """The learning rate of an iteration, a function of its number alone."""
        done = (iteration - 1) / self.config.train.iterations
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.config.optimizer.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.optimizer.lr
        return group["lr"]

    def iteration(self, iteration: int) -> dict[str, Any]:
        """Groups with their rewards, advantages, update; returns what metrics.jsonl keeps.

        Raises:
            RewardError: of a reward, see `score`; or rewards gave nothing to learn from, as in the iterations before.
        """
        self.stepped = False
        config = self.config
        groups: list[tuple[Group, Tensor]] = []
        logged: dict[str, list[float]] = {}
        unscored = Counter[str]()  # videos by the reward that failed
        telling = set[str]()  # rewards that tell members of a group apart
        prefix = "" if config.train.buffer is None else "buffer/"  # what a buffer was rewarded says nothing of the policy
        with profiling.record(self.generator.model.device) as seconds, ExitStack() as stack:
            for index in range(config.rollout.prompts_per_iteration):
                judged = self.source.draw(iteration, index)
                group = stack.enter_context(judged.group)
                total = weighted_total(judged.rewards, config.rewards)
                unscored.update({name: int(values.isnan().sum()) for name, values in judged.rewards.items()})
                for name, values in ({"reward": total} | {f"reward/{name}": values for name, values in judged.rewards.items()}).items():
                    values = values[values.isfinite()].double()
                    if not len(values):
                        continue
                    if zscore(values).any():
                        telling.add(name.removeprefix("reward/"))
                    logged.setdefault(prefix + name, []).append(values.mean().item())
                    logged.setdefault(f"{prefix}{name}_std", []).append(values.std(correction=0).item())
                logged.setdefault("pivot", []).append(group.pivot + 1)
                groups.append((group, self.advantages(judged)))
            self.unscored = 0 if prefix + "reward" in logged else self.unscored + 1
            self.alike = 0 if any(advantages.any() for _, advantages in groups) else self.alike + 1
            self._check_rewards(unscored, telling)
            lr = self.set_learning_rate(iteration)
            draw = () if config.train.buffer is None else (config.seed, iteration)
            statistics = self.objective.update(groups, self.stepper, draw=draw)
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        return means | statistics | {"failed_scores": unscored.total(), "lr": lr, "time": seconds}

    def _check_rewards(self, unscored: Counter[str], telling: set[str]) -> None:
        """End a run that its rewards teach nothing.

        unscored: videos of the last iteration by the reward that failed. telling: the rewards that told members of a group apart.

        Raises:
            RewardError: so it is, by all signs; the message names the rewards.
        """
        config = self.config
        failed = ", ".join(f"{name!r} failed for {number}" for name, number in unscored.items() if number)
        videos = f"of the last one's {config.rollout.prompts_per_iteration * config.rollout.group_size}, {failed}"
        if self.unscored == min(UNSCORED, config.train.iterations):
            raise RewardError(f"not one video of {self.unscored} iterations in a row got all its scores: {videos}")
        if self.alike == min(ALIKE, config.train.iterations):
            alike = ", ".join(repr(name) for name, weight in config.rewards.items() if weight and name not in telling)
            advice = "raise rollout.noise_strength or rollout.group_size" if config.train.buffer is None else "collect another buffer"
            raise RewardError(
                f"nothing was learnt in {self.alike} iterations in a row, for the members of each group had the same reward: in the last "
                f"one {alike or 'the weighted sum of the rewards'} did not tell them apart{f' ({videos})' if failed else ''}; take a "
                f"reward that does, or {advice}"
            )

    def device(self) -> dict[str, Any]:
        """What device.json says: the device, what it reaches at best, and by pivot the seconds below which no stage gets."""
        config, model = self.config, self.generator.model
        ceilings = measure_ceilings(model.device, model.dtype)
        name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{platform.machine()} CPU"
        floor = floors(config, model.config, VAESizes.from_config(self.generator.decoder.vae.config), ceilings)
        versions = {package: version_of(package) for package in ("torch", "arcopo_fast")}
        return {"device": name, "versions": versions, "dtype": config.generator.dtype, **ceilings._asdict(), "floor": floor}

    def over_plan(self) -> str | None:
        """What to say if the run has taken more of the device's memory than was planned."""
        device = self.generator.model.device
        return over_plan(self.config, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None

    def save(self, run: RunDirectory, iteration: int) -> None:
        """checkpoints/step-N: the adapter and the optimiser's state; complete or absent. Everything else follows from N."""
        with run.checkpoint(iteration) as directory:
            save_adapter(directory / "adapter", self.generator.model, base_model=self.config.generator.checkpoint)
            state = {"iteration": iteration, "optimizer": self.optimizer.state_dict(), "halved": self._halved()}
            torch.save(state, directory / "trainer.pt")

    def _halved(self) -> dict[str, Any]:
        """What became smaller than the recipe says when memory ran out: with other shapes a run that goes on would round differently."""
        wanted, now = self.config.objective, self.objective.settings
        changed = {key: getattr(now, key) for key in ("micro_batch", "checkpoint") if getattr(now, key) != getattr(wanted, key)}
        return changed | ({} if self.engine.largest_wave is None else {"largest_wave": self.engine.largest_wave})

    def restore(self, directory: Path) -> None:
        """Go back to what `save` wrote."""
        load_adapter(self.generator.model, directory / "adapter")
        state = torch.load(directory / "trainer.pt", map_location="cpu", weights_only=True)  # where AdamW counts its steps; the rest moves
        if state["iteration"] != step_of(directory):
            raise UserError(f"{directory} is the checkpoint of iteration {state['iteration']}; give it back its name")
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.moved = True
        halved = state.get("halved", {})
        self.engine.largest_wave = halved.pop("largest_wave", None)
        self.objective.settings = self.objective.settings.model_copy(update=halved)


def write_samples(run: RunDirectory, config: Config, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """The first evaluation videos as mp4, before and after, the same prompt and noise side by side."""
    videos = []
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
    """The table that ends a run: each reward and held-out metric before and after, and the change in baseline standard deviations."""
    width = max(len(one.name) for one in changes) + 2
    lines = [f"{'':{width}}  before   after  change  in std of a video"]
    for one in changes:
        label = f"({one.name})" if one.kind == "held out" else one.name
        in_spreads = f"{one.in_spreads:+6.2f}" if math.isfinite(one.in_spreads) else "     -"
        left_out = f"  {one.failed} left out: no score" if one.failed else ""
        lines.append(f"{label:{width}}  {one.before:6.3f}  {one.after:6.3f}  {one.change:+6.3f}  {in_spreads}{left_out}")
    return "\n".join([*lines, f"{videos} videos on fixed prompts and noises; metrics in (brackets) are never trained on"])


def train(config: Config, *, resume: RunDirectory | None = None, profile: int = 0) -> Path:
    """The whole run; returns its directory.

    Args:
        resume: go on with this run, whose configuration `config` is, from its last checkpoint.
        profile: iterations of which a PyTorch trace is written, `profile/trace.json.gz`.

    Raises:
        Interrupted: the user asked to stop; the message says what is kept and how to go on.
    """
    run = resume
    with ExitStack() as stack:
        try:
            if resume is None:
                RunDirectory.check(config)
            else:
                run = stack.enter_context(resume.owned())
                check_settings(run.path, config)
            if run is None or not run.evaluated:
                trainer = Trainer(config)
                trace = Trace(profile, of=config.train.iterations)
                if run is None:
                    run = stack.enter_context(RunDirectory.create(config).owned())
                before = iterations(trainer, run, trace)
                finish(trainer, run, before)
            write_report(run.path)
        except KeyboardInterrupt as error:
            raise error if isinstance(error, Interrupted) else Interrupted(how_to_go_on(run)) from None
    print(f"report: {run.path / 'report.html'}")
    return run.path


def iterations(trainer: Trainer, run: RunDirectory, trace: Trace) -> Evaluation:
    """Every iteration that is left, from the newest whole checkpoint on; returns the evaluation before the first one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint was saved after the iteration at hand.
    """
    config = trainer.config
    done = saved = run.restore(trainer.restore)
    if done > config.train.iterations:
        raise UserError(f"{run.path} has done {done} iterations, and train.iterations is {config.train.iterations}; give at least {done}")
    check_inputs(run.path, config, trainer.made_of, trainer.judges, done=done)
    run.write(DEVICE, json.dumps(trainer.device(), indent=2) + "\n")
    recent: deque[dict[str, Any]] = deque(maxlen=PATIENCE)
    with adapter_disabled(trainer.generator.model):  # bit for bit what the fresh adapter, which adds zeros, gives
        before = trainer.evaluate()
    with (
        MetricsWriter(run.path, after=done, tensorboard=config.run.tensorboard) as metrics,
        Progress(config.train.iterations, done) as progress,
        trace.to(run.path / "profile" / "trace.json.gz"),
        Interruption("the iteration") as interruption,
    ):
        for iteration in range(done + 1, config.train.iterations + 1):
            try:
                record = trainer.iteration(iteration)
            except BaseException as error:
                if iteration - 1 > saved and not trainer.stepped:
                    trainer.save(run, iteration - 1)
                if isinstance(error, RewardError):
                    raise type(error)(f"{error}; {resumption(run)}") from None
                raise
            trace.step()
            metrics.write(iteration, record)
            recent.append({"step": iteration} | record)
            if len(recent) == recent.maxlen and (since := stalled_since(recent)) is not None:
                warnings.warn(notice(since), stacklevel=1)
                recent.clear()  # say it again only after as many more
            progress.update(record.get("reward"), live=record.get(f"update{config.objective.updates}/live", 0.0))
            last = iteration == config.train.iterations
            if (last or iteration == 1) and (said := trainer.over_plan()):
                warnings.warn(said, stacklevel=1)
            if last or interruption.asked or (config.train.save_every and iteration % config.train.save_every == 0):
                trainer.save(run, iteration)
                saved = iteration
            if interruption.asked:
                raise Interrupted(f"stopped after iteration {iteration}; {resumption(run)}")
    return before


def finish(trainer: Trainer, run: RunDirectory, before: Evaluation) -> None:
    """Evaluate, and write what a run leaves behind. evaluation.json is the last: with it the run is complete but for its report."""
    config, after = trainer.config, trainer.evaluate()
    document = {"before": before.summary(), "after": after.summary(), "videos": write_samples(run, config, before, after)}
    card = {"README.md": model_card(config, document)}
    save_adapter(run.path / "adapter", trainer.generator.model, base_model=config.generator.checkpoint, more=card)
    run.write("evaluation.json", json.dumps(document, indent=2) + "\n")
    print(comparison(changes(config, document), len(before.prompts)))


def how_to_go_on(run: RunDirectory | None) -> str:
    """What is kept of a run that ends early, and the command that goes on with it."""
    if run is None:
        return "nothing was begun; the same command starts it"
    if run.evaluated:
        return f"{run.path} is complete but for its report; write that with python -m arcopo_fast.report {run.path}"
    kept = run.checkpoints()
    stand = f"iterations up to {step_of(kept[-1])} are kept" if kept else "its settings are kept"
    return f"{stand}; {resumption(run)}"


def resumption(run: RunDirectory) -> str:
    return f"go on with python -m arcopo_fast.train --resume {run.path}"


def command_line() -> RecipeParser:
    parser = RecipeParser("python -m arcopo_fast.train", "Align a generator with AR-CoPO.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory that the run needs by component, and the settings that fit each device; start nothing, need no GPU",
    )
    parser.add_argument(
        "--device-memory",
        type=numbers,
        metavar="24,40,80,141",
        default=(),
        help="with --dry-run: for devices of so many GB; without it, for the GPU that is here, else for these four",
    )
    parser.add_argument(
        "--profile", type=positive_int, metavar="N", default=0, help="write a PyTorch trace of N iterations into the run's directory"
    )
    parser.add_argument("--mode", choices=["on_policy", "semi_on_policy", "off_policy"], help="the same as train.mode=...")
    parser.add_argument("--buffer", metavar="DIR", help="the same as train.buffer=DIR: groups that python -m arcopo_fast.collect made")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped, from its last checkpoint and its config.yaml")
    return parser


def settings_of(options: Any) -> list[str]:
    """The settings that --mode and --buffer stand for."""
    return [setting(f"train.{name}", value) for name in ("mode", "buffer") if (value := getattr(options, name)) is not None]


def run_to_resume(options: Any) -> RunDirectory | None:
    """The run that --resume names.

    Raises:
        UserError: it cannot go on, or something else is asked for that its own config.yaml says.
    """
    if not options.resume:
        return None
    if options.settings or options.dry_run or settings_of(options):
        raise UserError("--resume goes on with the run's own config.yaml; leave recipe, settings and --dry-run out")
    return RunDirectory.open(options.resume)


def main(argv: list[str]) -> None:
    command = command_line().read_config(argv, settings_of, lambda options: run.path if (run := run_to_resume(options)) else None)
    if command is None:
        return
    config, options = command
    run = run_to_resume(options)
    if options.device_memory and not options.dry_run:
        raise UserError("--device-memory only says what --dry-run is about; add --dry-run, or leave it out")
    if 0 in options.device_memory:
        raise UserError("--device-memory takes sizes above 0 GB")
    if options.profile and options.dry_run:
        raise UserError("--profile traces a run, and --dry-run starts none; leave one out")
    if options.dry_run:
        check_trainable(config)
        print(dry_run(config, options.device_memory))
        return
    tune_for_cpu()
    train(config, resume=run, profile=options.profile)


if __name__ == "__main__":
    sys.exit(run_command(main))
