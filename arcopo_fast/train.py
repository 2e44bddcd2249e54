"""Align a generator with AR-CoPO.

    python -m arcopo_fast.train [RECIPE] [key=value ...] [--mode M --buffer DIR] [--dry-run] [--profile N]
    python -m arcopo_fast.train --resume RUN

The loop, top to bottom: `one_iteration` is the method, `iterations` what surrounds it, `train` a whole run. Everything a run makes lies in
its run directory.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from arcopo_fast.cli import RecipeParser, numbers, positive_int, run_command
from arcopo_fast.config.reading import setting
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.judging import Evaluation
from arcopo_fast.model.lora import adapter_disabled
from arcopo_fast.planning.plan import dry_run
from arcopo_fast.reports.results import DEVICE
from arcopo_fast.reports.run import write_report
from arcopo_fast.reports.stall import PATIENCE, notice, stalled_since
from arcopo_fast.rewards.base import RewardError
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.console import Interrupted, Interruption, Progress
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.runtime.profiling import Trace
from arcopo_fast.storage.identity import check_inputs, check_settings
from arcopo_fast.storage.metrics import MetricsWriter
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.training.finish import finish, how_to_go_on, resumption
from arcopo_fast.training.groups import JudgedGroup
from arcopo_fast.training.lessons import LearningWatch, reward_record
from arcopo_fast.training.trainer import Trainer, check_trainable

# The loop --------------------------------------------------------------------------------------------------------------------------


def judged_group(trainer: Trainer, iteration: int, index: int, stack: ExitStack) -> JudgedGroup:
    """Return a group of videos with their rewards; its pages are given back with `stack`."""
    if trainer.buffer is not None:
        judged = trainer.buffer.draw(iteration, index)
        stack.enter_context(judged.group)
        return judged
    rollouts = trainer.rollouts
    prompt = rollouts.prompt(iteration, index)
    text = rollouts.encode(prompt)
    group = stack.enter_context(rollouts.roll_out(text, iteration, index))
    frames = rollouts.decode(group)  # a slice after the other, as they are judged
    rewards = rollouts.judge(frames, prompt)
    return JudgedGroup(group, prompt, rewards)


def one_iteration(trainer: Trainer, watch: LearningWatch, iteration: int) -> dict[str, Any]:
    """Roll out, decode, judge, take advantages, update; return what metrics.jsonl keeps (AR-CoPO, one iteration).

    Raises:
        RewardError: a reward failed, see `score`; or, as in the iterations before, the rewards gave nothing to learn from.
    """
    config = trainer.config
    with profiling.record(trainer.generator.model.device) as seconds, ExitStack() as stack:
        groups = [judged_group(trainer, iteration, index, stack) for index in range(config.rollout.prompts_per_iteration)]
        advantages = [judged.advantages(config) for judged in groups]
        watch.check(groups, advantages)
        lr = trainer.set_learning_rate(iteration)
        draw = () if trainer.buffer is None else (config.seed, iteration)
        lessons = [(judged.group, values) for judged, values in zip(groups, advantages)]
        statistics = trainer.objective.update(lessons, trainer.stepper, draw=draw)
    return reward_record(config, groups) | statistics | {"lr": lr, "time": seconds}


def iterations(trainer: Trainer, run: RunDirectory, trace: Trace) -> Evaluation:
    """Do every iteration that is left, from the newest whole checkpoint on; return the evaluation before the first one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint was saved after the iteration at hand.
    """
    config, watch = trainer.config, LearningWatch(trainer.config)
    done = saved = run.restore(trainer.restore)
    if done > config.train.iterations:
        raise UserError(f"{run.path} has done {done} iterations, and train.iterations is {config.train.iterations}; give at least {done}")
    check_inputs(run.path, config, trainer.input_digests, trainer.judges, done=done)
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
            steps = trainer.stepper.begun
            try:
                record = one_iteration(trainer, watch, iteration)
            except BaseException as error:
                if iteration - 1 > saved and trainer.stepper.begun == steps:  # the weights are still those of the iteration before
                    trainer.save(run, iteration - 1)
                if isinstance(error, RewardError):
                    error.args = (f"{error}; {resumption(run)}",)
                raise
            trace.step()
            metrics.write(iteration, record)
            recent.append({"step": iteration} | record)
            if len(recent) == recent.maxlen and (since := stalled_since(recent)) is not None:
                warnings.warn(notice(since), stacklevel=1)
                recent.clear()  # say it again only after as many more
            progress.update(record.get("reward"), **trainer.objective.headline(record))
            last = iteration == config.train.iterations
            if (last or iteration == 1) and (over := trainer.over_plan()):
                warnings.warn(over, stacklevel=1)
            if last or interruption.asked or (config.train.save_every and iteration % config.train.save_every == 0):
                trainer.save(run, iteration)
                saved = iteration
            if interruption.asked:
                raise Interrupted(f"stopped after iteration {iteration}; {resumption(run)}")
    return before


def train(config: Config, *, resume: RunDirectory | None = None, profile: int = 0) -> Path:
    """Do the whole run; return its directory.

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


# The command -----------------------------------------------------------------------------------------------------------------------


def command_line() -> RecipeParser:
    """Return the parser of the command line."""
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
        help="with --dry-run: sizes of devices in GB (default: the GPU of this machine, else these four)",
    )
    parser.add_argument(
        "--profile", type=positive_int, metavar="N", default=0, help="write a PyTorch trace of N iterations into the run's directory"
    )
    parser.add_argument("--mode", choices=["on_policy", "semi_on_policy", "off_policy"], help="the same as train.mode=...")
    parser.add_argument("--buffer", metavar="DIR", help="the same as train.buffer=DIR: groups that python -m arcopo_fast.collect made")
    parser.add_argument("--resume", metavar="RUN", help="continue a stopped run from its last checkpoint, with its config.yaml")
    return parser


def settings_of(options: Any) -> list[str]:
    """Return the settings that --mode and --buffer stand for."""
    return [setting(f"train.{name}", value) for name in ("mode", "buffer") if (value := getattr(options, name)) is not None]


def run_to_resume(options: Any) -> RunDirectory | None:
    """Return the run that --resume names.

    Raises:
        UserError: the run cannot go on, or an option contradicts its own config.yaml.
    """
    if not options.resume:
        return None
    if options.settings or options.dry_run or settings_of(options):
        raise UserError("--resume uses the run's own config.yaml; leave recipe, settings and --dry-run out")
    return RunDirectory.open(options.resume)


def main(argv: list[str]) -> None:
    """Run the command."""
    command = command_line().read_config(argv, settings_of, lambda options: run.path if (run := run_to_resume(options)) else None)
    if command is None:
        return
    config, options = command
    run = run_to_resume(options)
    if options.device_memory and not options.dry_run:
        raise UserError("--device-memory is for --dry-run only; add --dry-run, or leave --device-memory out")
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
