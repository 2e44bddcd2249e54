"""The AR-CoPO paper's findings, tried on the toy world, in parts of at most two hours on two cores.

    python examples/paper_at_small_scale/run.py                 # every part that has no result yet, then the page
    python examples/paper_at_small_scale/run.py --part methods  # one part; results/methods.json is its result
    python examples/paper_at_small_scale/run.py --judge         # the page and the tables, from the results alone
    python examples/paper_at_small_scale/run.py --quick         # minutes: shows that everything runs, and proves nothing

It trains through the library's own commands. What is done is kept: the same command continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from erring import SCALES
from outcome import write_outcome
from plan import PARTS, Pair, Part, Run, evaluation, quick, runs
from raw import Results, collect

from arcopo_fast.cli import Parser, positive_int, run_command
from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ATTEMPTS = 20
"""A run ends when ten iterations in a row taught it nothing, as with a judge that has few grades. That is a result here: it is resumed."""


@dataclass(frozen=True)
class Job:
    """name: of its log. command: without the interpreter. done: whether there is nothing left to do. after: jobs that it needs."""

    name: str
    command: Callable[[], list[str]]
    done: Callable[[], bool]
    after: tuple[str, ...] = ()


def jobs(part: Part, chosen: Mapping[str, Pair], out: Path, methods: Part) -> list[Job]:
    """Return what a part has to do, in an order in which each job's needs come first.

    methods: the part whose AR-CoPO runs a merge takes; they are made here if they are not there.
    """
    found = []
    everything = runs(part, chosen)
    if part.levels:
        file = out / "erring.json"
        measured = ["-m", "erring", "toy", *evaluation(part), "train.threads=1", "--out", str(file)]
        found.append(Job("judges-scales", lambda: measured, file.is_file))
    for seed in sorted({run.seed for run in everything if run.mode != "on_policy"}):
        buffer = _buffer(out, part, seed)
        collection = ["-m", "arcopo_fast.collect", "toy", f"seed={seed}", *evaluation(part), "train.threads=1"]
        collection += ["--buffer", str(buffer), "--groups", str(part.groups)]
        found.append(Job(f"{part.name}-buffer-{seed}", partial(list, collection), partial(_full, buffer, part.groups)))
    found += [_training(part, run, out) for run in everything]
    if part.scales:
        on_policy = [run for run in runs(methods, chosen) if run.method == "ar_copo" and run.seed in part.seeds]
        found += [_training(methods, run, out) for run in on_policy]
        found += [_merging(part, out, methods, seed) for seed in part.seeds]
    for name, method in part.known().items() if part.draws else ():
        where = out / "entropy" / name
        study = ["-m", "arcopo_fast.entropy", method.recipe, *method.settings, "train.threads=1", "--out", str(where)]
        study += ["--prompts", str(part.prompts), "--draws", str(part.draws)]
        found.append(Job(f"entropy-{name}", partial(list, study), (where / "entropy.html").is_file))
    return found


def _training(part: Part, run: Run, out: Path) -> Job:
    folder = out / "runs" / part.name / run.name
    fresh = ["-m", "arcopo_fast.train", run.recipe, f"name={run.name}", f"run.directory={folder.parent}", *run.settings]
    after = [f"{part.name}-buffer-{run.seed}"] if run.mode != "on_policy" else []
    fresh += [f"train.buffer={_buffer(out, part, run.seed)}"] if run.mode != "on_policy" else []
    again = ["-m", "arcopo_fast.train", "--resume", str(folder)]
    after += ["judges-scales"] if part.levels else []
    return Job(f"{part.name}-{run.name}", lambda: again if folder.exists() else fresh, (folder / "evaluation.json").is_file, tuple(after))


def _merging(part: Part, out: Path, methods: Part, seed: int) -> Job:
    semi, on, where = (
        out / "runs" / part.name / f"caption_semi-{seed}",
        out / "runs" / methods.name / f"ar_copo-{seed}",
        out / "merges" / str(seed),
    )
    command = ["-m", "arcopo_fast.merge", "--semi", str(semi), "--on", str(on), "--out", str(where)]
    command += ["--sweep", ",".join(f"{scale:g}" for scale in part.scales), *evaluation(part, videos=2)]
    return Job(f"merge-{seed}", lambda: command, (where / "sweep.json").is_file, (f"{part.name}-{semi.name}", f"{methods.name}-{on.name}"))


def _buffer(out: Path, part: Part, seed: int) -> Path:
    return out / "buffers" / part.name / str(seed)


def _full(buffer: Path, groups: int) -> bool:
    return len(list((buffer / "entries").glob("*.safetensors"))) >= groups


def run_all(todo: Sequence[Job], out: Path, workers: int) -> None:
    """Run what is not done, `workers` at a time, each on one thread.

    Raises:
        UserError: a job failed; the message names its log.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    running: set[subprocess.Popen[bytes]] = set()
    futures: dict[str, Future[float]] = {}
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths, SCALES: str(out / "erring.json")}

    def work(job: Job) -> float:
        for name in job.after:  # an earlier job, so it is running or done: nobody waits for one that waits
            futures[name].result()
        if job.done():
            return 0.0
        start, log = time.monotonic(), out / "logs" / f"{job.name}.txt"
        for _ in range(ATTEMPTS):
            with log.open("ab") as file:
                command = [sys.executable, *job.command()]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                running.add(process)
                status = process.wait()
                running.discard(process)
            if not status:
                return time.monotonic() - start
            last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
            if "nothing was learned" not in last:
                break
        raise UserError(f"{job.name} ended with status {status}: {last} (see {log})")

    with ThreadPoolExecutor(workers) as pool:
        for job in todo:  # one by one: a job finds those it needs here
            futures[job.name] = pool.submit(work, job)
        names = {future: name for name, future in futures.items()}
        try:
            for number, future in enumerate(as_completed(names), start=1):
                seconds = future.result()
                took = f"{seconds:.0f} s" if seconds else "was done"
                print(f"{number}/{len(todo)}  {names[future]}  {took}", file=sys.stderr, flush=True)
        except BaseException:
            for future in names:
                future.cancel()
            for process in list(running):
                process.terminate()  # a training run finishes its iteration and saves it
            raise


def run_part(part: Part, methods: Part, out: Path, results: Path, workers: int) -> None:
    """Run a part, and write its result.

    Raises:
        UserError: the sweep has no result for a method, `out` holds other runs of the same names, or a job failed.
    """
    chosen = Results(results).chosen()
    planned = {run.name: json.loads(json.dumps(run._asdict())) for run in runs(part, chosen)}
    file = out / "plans" / f"{part.name}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if others := [name for name, run in planned.items() if before.get(name, run) != run]:
        raise UserError(f"{out} holds another run {others[0]} (see {file}); give another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(before | planned, indent=1) + "\n")
    run_all(jobs(part, chosen, out, methods), out, workers)
    print(f"result: {collect(part, out, chosen, results)}")


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser("run.py", "Try the AR-CoPO paper's findings on the toy world.")
    parser.add_argument("--part", choices=list(PARTS), help="run this part alone, also if it has a result (default: all that have none)")
    parser.add_argument("--judge", action="store_true", help="run nothing: make the page and the tables from the results that are there")
    parser.add_argument("--quick", action="store_true", help="one seed, one iteration: shows that all of it runs, proves nothing")
    parser.add_argument("--out", metavar="DIR", help="where runs go (default: runs/paper, or runs/paper-quick with --quick)")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes at once, of one thread each")
    options = parser.read(argv)
    if options is None:
        return
    out = Path(options.out or ("runs/paper-quick" if options.quick else "runs/paper")).absolute()
    results = out / "results" if options.quick else RESULTS
    parts = {name: quick(part) if options.quick else part for name, part in PARTS.items()}
    if not options.judge:
        left = [name for name in parts if name not in Results(results).parts]
        for name in [options.part] if options.part else left:
            run_part(parts[name], parts["methods"], out, results, options.jobs)
    for outcome in write_outcome(Results(results), results, quick=options.quick):
        print(f"{outcome.verdict:15} {outcome.title}")
    print(f"page: {results / 'index.html'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
