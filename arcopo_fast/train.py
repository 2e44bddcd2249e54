"""Align a generator with AR-CoPO.

    python -m arcopo_fast.train [RECIPE] [key=value ...] [--mode M --buffer DIR] [--dry-run] [--profile N]
    python -m arcopo_fast.train --resume RUN
    torchrun --nproc_per_node=8 -m arcopo_fast.train ...        on several GPUs, see docs/scaling.md

The loop, top to bottom: `one_iteration` is the method, `iterations` what surrounds it, `train` a whole run. Everything a run makes lies in
its run directory.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import ExitStack, closing
from pathlib import Path
from socket import gethostname
from typing import Any

from arcopo_fast.cli import RecipeParser, numbers, positive_int, run_command
from arcopo_fast.config.reading import setting
from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.filters import FILTERS
from arcopo_fast.evaluation.judging import Evaluation
from arcopo_fast.model.lora import adapter_disabled
from arcopo_fast.planning.plan import dry_run
from arcopo_fast.reports.results import DEVICE
from arcopo_fast.reports.run import write_report
from arcopo_fast.rewards.base import RewardError
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.console import Interrupted, Interruption
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.runtime.place import job, started_again
from arcopo_fast.runtime.profiling import Trace
from arcopo_fast.runtime.rank_console import log_to
from arcopo_fast.storage.identity import check_inputs, check_settings
from arcopo_fast.storage.run_dir import RunDirectory
from arcopo_fast.training.finish import finish, how_to_go_on, resumption
from arcopo_fast.training.lessons import LearningWatch, reward_record
from arcopo_fast.training.recorder import Recorder
from arcopo_fast.training.trainer import Trainer, check_trainable

# The loop --------------------------------------------------------------------------------------------------------------------------


def one_iteration(trainer: Trainer, watch: LearningWatch, iteration: int) -> dict[str, Any]:
    """Roll out, decode, judge, take advantages, update; return what metrics.jsonl keeps (AR-CoPO, one iteration).

    Every rank does it with groups of its own, or with branches of its own, and all return the same, times aside.

    Raises:
        RewardError: a reward failed, see `score`; or, as in the iterations before, the rewards gave nothing to learn from.
    """
    config, own = trainer.config, []
    lr = trainer.set_learning_rate(iteration)
    with profiling.record(trainer.generator.model.device) as seconds, ExitStack() as stack:
        updates = stack.enter_context(trainer.updates(iteration))
        for index, judged in stack.enter_context(closing(trainer.groups.each(iteration, trainer.own_groups))):
            stack.enter_context(judged.group)
            own.append(judged.outcome(index, config))
            updates.learn(index, judged.group, own[-1].advantages, judged.weighted(config))
            if len(trainer.own_groups) > 1:
                judged.group.put_away()  # memory is that of one group
        outcomes = trainer.everybodys(own)
        watch.check(outcomes)
        trainer.agree()
        statistics = updates.finish()
    trainer.check_adapters(iteration)
    return reward_record(config, outcomes) | statistics | {"lr": lr, "time": trainer.world.mean(seconds)}


def iterations(trainer: Trainer, run: RunDirectory, trace: Trace) -> Evaluation:
    """Do every iteration that is left, from the newest whole checkpoint on; return the evaluation before the first one.

    Raises:
        Interrupted: the user asked to stop; a checkpoint was saved after the iteration at hand.
    """
    config, world, watch = trainer.config, trainer.world, LearningWatch(trainer.config)
    done = saved = restored(trainer, run)
    with adapter_disabled(trainer.generator.model):  # bit for bit what the fresh adapter, which adds zeros, gives
        before = trainer.evaluate(FILTERS if config.evaluation.filters else None)
    with Recorder(trainer, run, trace, done) as recorder, Interruption("the iteration") as interruption:
        for iteration in range(done + 1, config.train.iterations + 1):
            steps = trainer.stepper.begun
            try:
                record = one_iteration(trainer, watch, iteration)
            except BaseException as error:
                if iteration - 1 > saved and trainer.stepper.begun == steps:  # the weights are still those of the iteration before
                    recorder.save(iteration - 1)
                if isinstance(error, RewardError):
                    error.args = (f"{error}; {resumption(run)}",)
                raise
            recorder.write(iteration, record)
            due = iteration == config.train.iterations or (config.train.save_every and iteration % config.train.save_every == 0)
            asked = world.any(interruption.asked)
            if due or asked:
                recorder.save(iteration)
                saved, asked = iteration, world.any(interruption.asked)
            if asked:
                raise Interrupted(f"stopped after iteration {iteration}; {resumption(run)}")
    return before


def restored(trainer: Trainer, run: RunDirectory) -> int:
    """Restore the newest whole checkpoint on every rank; return its iteration. Rank 0 looks for it, and holds the run to its inputs."""
    config, world, done = trainer.config, trainer.world, 0
    if world.is_main:
        done = run.restore(trainer.restore)
        if done > config.train.iterations:
            raise UserError(
                f"{run.path} has done {done} iterations, and train.iterations is {config.train.iterations}; give at least {done}"
            )
        check_inputs(run.path, config, trainer.input_digests, trainer.judges, done=done)
        run.write(DEVICE, json.dumps(trainer.device(), indent=2) + "\n")
        if slow := trainer.slow_attention():
            warnings.warn(slow, stacklevel=1)
    done = world.from_main(done)
    if done and not world.is_main:
        trainer.restore(run.checkpoint_path(done))
    trainer.check_adapters(done)
    return done


def train(config: Config, *, resume: RunDirectory | None = None, profile: int = 0, world: World | None = None) -> Path:
    """Do the whole run; return its directory.

    Args:
        resume: go on with this run, whose configuration `config` is, from its last checkpoint.
        profile: iterations of which a PyTorch trace is written, `profile/trace.json.gz`.
        world: all ranks of the job, each of which calls this. Rank 0 owns the directory and writes.

    Raises:
        Interrupted: the user asked to stop; the message says what is kept and how to go on.
    """
    world, run = world or World(), resume
    with ExitStack() as stack:
        try:
            if world.is_main and resume is None:
                RunDirectory.check(config)
            elif world.is_main and resume is not None:
                run = stack.enter_context(resume.owned())
                check_settings(run.path, config)
            evaluated = world.from_main(run is not None and run.evaluated)
            if not evaluated:
                trainer = Trainer(config, world)
                trainer.check_ranks()
                trace = Trace(profile, of=config.train.iterations)
                if world.is_main and run is None:
                    run = stack.enter_context(RunDirectory.create(config, job()).owned())
            run = seen_by_all(world, run)
            if not evaluated:
                finish(trainer, run, iterations(trainer, run, trace))
            if world.is_main:
                write_report(run.path)
        except KeyboardInterrupt as error:
            raise error if isinstance(error, Interrupted) else Interrupted(how_to_go_on(run)) from None
    print(f"report: {run.path / 'report.html'}")
    return run.path


def seen_by_all(world: World, run: RunDirectory | None) -> RunDirectory:
    """Return rank 0's run directory; on the other ranks it is only read.

    Raises:
        UserError: a rank does not see it: the machines have no disk in common.
    """
    path = world.from_main(None if run is None else run.path.absolute())
    assert path is not None
    if not (path / "config.yaml").is_file():
        raise UserError(f"rank {world.rank}, on {gethostname()}, does not see {path}; set run.directory to a disk that all machines share")
    log_to(path)
    return run if run is not None and world.is_main else RunDirectory(path)


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
        "--ranks", type=positive_int, metavar="N", help="with --dry-run: plan for each of N ranks, which torchrun would start (default: 1)"
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


def begun_by_this_job(config: Config) -> RunDirectory | None:
    """Return the run that this job began before its launcher started it again, if it did."""
    name = job()
    return RunDirectory.begun_by(name, config) if name is not None and started_again() else None


def main(argv: list[str]) -> None:
    """Run the command."""
    command = command_line().read_config(argv, settings_of, lambda options: run.path if (run := run_to_resume(options)) else None)
    if command is None:
        return
    config, options = command
    run = run_to_resume(options)
    if options.device_memory and not options.dry_run:
        raise UserError("--device-memory is for --dry-run only; add --dry-run, or leave --device-memory out")
    if options.ranks and not options.dry_run:
        raise UserError(
            f"--ranks is for --dry-run only; torchrun starts the ranks of a run: torchrun --nproc_per_node={options.ranks} -m ..."
        )
    if 0 in options.device_memory:
        raise UserError("--device-memory takes sizes above 0 GB")
    if options.profile and options.dry_run:
        raise UserError("--profile traces a run, and --dry-run starts none; leave one out")
    if options.dry_run:
        check_trainable(config)
        print(dry_run(config, options.device_memory, options.ranks or 1))
        return
    tune_for_cpu()
    with World.joined(config.train.rank_timeout) as world:
        if run is None and world.is_main:
            run = begun_by_this_job(config)
        train(config, resume=run, profile=options.profile, world=world)


if __name__ == "__main__":
    sys.exit(run_command(main))
