"""The AR-CoPO paper's findings, tried on the toy world: one command, some three quarters of an hour on two cores.

    python examples/paper_at_small_scale/run.py [--out DIR] [--jobs N] [--quick]

It trains with every method for several seeds, through the library's own commands, and writes DIR/index.html and DIR/results.json, which
put each outcome beside the paper's claim. What is done is kept: the same command continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from outcome import write_outcome

from arcopo_fast.cli import Parser, positive_int, run_command
from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_write


@dataclass(frozen=True)
class Plan:
    """How much is done. iterations: of the methods that are compared; caption: on the caption reward alone, and on a buffer of `groups`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    iterations: int = 150
    caption: int = 200
    groups: int = 100
    scales: tuple[float, ...] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    prompts: int = 16
    videos: int = 2
    draws: int = 2


FULL = Plan()
QUICK = Plan(seeds=(0,), iterations=6, caption=8, groups=6, scales=(0, 1), prompts=3, videos=1, draws=1)

CAPTION_ONLY = "rewards={toy_ta: 1, toy_vq: 0, toy_mq: 0}"
"""The others are still measured; at weight 0 they count as held out."""


REPORTS = {
    "methods": ("ar_copo", "sde_shared", "sde_fresh"),
    "caption": ("caption_on_policy", "caption_semi_on_policy", "caption_off_policy"),
}
"""Pages of several runs, by name."""


@dataclass(frozen=True)
class Job:
    """name: of its log. command: without the interpreter. done: whether there is nothing left to do. after: jobs that it needs."""

    name: str
    command: Callable[[], list[str]]
    done: Callable[[], bool]
    after: tuple[str, ...] = ()


def jobs(plan: Plan, out: Path) -> list[Job]:
    """Everything, in an order in which each job's needs come first; the longest first where there is a choice."""

    def training(seed: int, method: str, recipe: str, iterations: int, *settings: str, after: tuple[str, ...] = ()) -> Job:
        run = out / "runs" / f"{method}-{seed}"
        fresh = [
            *("-m", "arcopo_fast.train", recipe, f"name={run.name}", f"run.directory={run.parent}", f"seed={seed}"),
            *(f"train.iterations={iterations}", f"train.save_every={max(1, iterations // 4)}", "train.threads=1"),
            *(f"evaluation.prompts={plan.prompts}", f"evaluation.videos_per_prompt={plan.videos}", "evaluation.sample_videos=2"),
            *("run.tensorboard=false", *settings),
        ]
        again = ["-m", "arcopo_fast.train", "--resume", str(run)]
        return Job(run.name, lambda: again if run.exists() else fresh, (run / "evaluation.json").is_file, after)

    found = []
    for seed in plan.seeds:
        found.append(training(seed, "ar_copo", "toy", plan.iterations))
        found.append(training(seed, "sde_shared", "toy_sde_grpo", plan.iterations, "objective.init_noise=shared"))
        found.append(training(seed, "sde_fresh", "toy_sde_grpo", plan.iterations, "objective.init_noise=fresh"))
        found.append(training(seed, "caption_on_policy", "toy", plan.caption, CAPTION_ONLY))
        buffer = out / "buffers" / str(seed)
        where = ["--buffer", str(buffer), "--groups", str(plan.groups)]
        collect = ["-m", "arcopo_fast.collect", "toy", f"seed={seed}", "train.threads=1", *where]
        name = f"collect-{seed}"
        found.append(Job(name, lambda collect=collect: collect, lambda buffer=buffer: _entries(buffer) >= plan.groups))
        for method, mode, settings in (
            ("semi_on_policy", "semi_on_policy", ()),
            ("caption_semi_on_policy", "semi_on_policy", (CAPTION_ONLY,)),
            ("caption_off_policy", "off_policy", (CAPTION_ONLY,)),
        ):
            settings = (f"train.mode={mode}", f"train.buffer={buffer}", *settings)
            found.append(training(seed, method, "toy", plan.caption, *settings, after=(name,)))
    for seed in plan.seeds:
        semi, on, merged = out / "runs" / f"semi_on_policy-{seed}", out / "runs" / f"ar_copo-{seed}", out / "merges" / str(seed)
        sweep = [
            *("-m", "arcopo_fast.merge", "--semi", str(semi), "--on", str(on), "--out", str(merged)),
            *("--sweep", ",".join(f"{scale:g}" for scale in plan.scales)),
        ]
        found.append(Job(f"merge-{seed}", lambda sweep=sweep: sweep, (merged / "sweep.json").is_file, (semi.name, on.name)))
    entropy = [
        *("-m", "arcopo_fast.entropy", "toy", "train.threads=1", "--out", str(out / "entropy")),
        *("--prompts", str(plan.prompts // 2 or 1), "--draws", str(plan.draws)),
    ]
    found.append(Job("entropy", lambda: entropy, (out / "entropy" / "entropy.html").is_file))
    return found


def _entries(buffer: Path) -> int:
    return len(list((buffer / "entries").glob("*.safetensors")))


def run_all(todo: Sequence[Job], out: Path, workers: int) -> None:
    """Run what is not done, `workers` at a time, each on one thread.

    Raises:
        UserError: a job failed; the message names its log.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    running: set[subprocess.Popen[bytes]] = set()
    futures: dict[str, Future[float]] = {}

    def work(job: Job) -> float:
        for name in job.after:  # an earlier job, so it is running or done: nobody waits for one that waits
            futures[name].result()
        if job.done():
            return 0.0
        start, log = time.monotonic(), out / "logs" / f"{job.name}.txt"
        with log.open("ab") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            process = subprocess.Popen([sys.executable, *job.command()], stdout=file, stderr=file, env=environment, start_new_session=True)
            running.add(process)
            status = process.wait()
            running.discard(process)
        if status:
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
            raise UserError(f"{job.name} ended with status {status}: {lines[-1]} (see {log})")
        return time.monotonic() - start

    with ThreadPoolExecutor(workers) as pool:
        for job in todo:  # one by one: a job finds those it needs here
            futures[job.name] = pool.submit(work, job)
        try:
            for number, future in enumerate(as_completed(futures.values()), start=1):
                seconds = future.result()
                name = next(name for name, one in futures.items() if one is future)
                took = f"{seconds:.0f} s" if seconds else "was done"
                print(f"{number}/{len(todo)}  {name}  {took}", file=sys.stderr, flush=True)
        except BaseException:
            for future in futures.values():
                future.cancel()
            for process in list(running):
                process.terminate()  # a training run finishes its iteration and saves it
            raise


def main(argv: list[str]) -> None:
    parser = Parser("run.py", "Try the AR-CoPO paper's findings on the toy world.")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default: runs/paper, or runs/paper-quick with --quick)")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes at once, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one seed, a few iterations: shows that all of it runs, proves nothing")
    options = parser.read(argv)
    if options is None:
        return
    plan = QUICK if options.quick else FULL
    out = Path(options.out or ("runs/paper-quick" if options.quick else "runs/paper"))
    planned = json.dumps(asdict(plan), indent=2) + "\n"
    if (out / "plan.json").exists() and (out / "plan.json").read_text() != planned:
        raise UserError(f"{out} holds the results of another plan (see its plan.json); give another --out")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "plan.json", planned)
    todo = jobs(plan, out)
    run_all(todo, out, options.jobs)
    for name, methods in REPORTS.items():
        runs = [str(out / "runs" / f"{method}-{seed}") for method in methods for seed in plan.seeds]
        subprocess.run([sys.executable, "-m", "arcopo_fast.report", *runs, "--out", str(out / f"{name}.html")], check=True)
    for claim in write_outcome(out, plan.seeds, quick=options.quick):
        print(f"{claim.verdict:15} {claim.title}")
    print(f"page: {out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
