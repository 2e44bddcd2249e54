"""VBench's own scorer, run in the environment it needs: one dimension at a time, what is scored already left as it is.

The call is what `vbench evaluate` makes, without the shell that it puts in between: that one takes whatever `python` comes first, breaks at
spaces and hides the exit status. Temporal flickering is scored on static videos alone, which `vbench static_filter` picks, as the
project's README asks for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.vbench.data import (
    FLICKERING,
    FLICKERING_VIDEOS,
    RESULTS,
    VIDEOS_PER_PROMPT,
    Prompt,
    read_result,
    unique_prompts,
    video_name,
)
from arcopo_fast.storage.atomic import atomic_directory, atomic_write

SHOWN_LINES = 20
"""Lines that are shown of a scorer that failed; its log has all."""


class Scorer(NamedTuple):
    """VBench in an environment of its own. package: the directory of its Python package. info: its prompts."""

    python: Path
    package: Path
    info: Path

    @classmethod
    def find(cls, python: Path, info: Path | None = None) -> Scorer:
        """In the environment of an interpreter, or of a virtual environment's directory.

        info: in place of the VBench_full_info.json that comes with it.

        Raises:
            UserError: it cannot be run, or has no VBench.
        """
        python = python / "bin" / "python" if python.is_dir() else Path(shutil.which(python) or python)
        python = python.absolute()  # not resolved: that of a virtual environment is a link, and known by its place
        look = "import importlib.util as util; spec = util.find_spec('vbench'); print(*(spec.submodule_search_locations if spec else ()))"
        try:
            found = subprocess.run([python, "-c", look], capture_output=True, text=True, cwd="/", env=_environment()).stdout
        except OSError as error:
            raise UserError(f"cannot run {python}: {error.strerror}; expected the Python interpreter of VBench's environment") from None
        if not found.strip():
            raise UserError(f"{python} has no vbench; install it there (pip install vbench, and detectron2 for four of its dimensions)")
        package = Path(found.strip())
        return cls(python, package, info.absolute() if info else package / "VBench_full_info.json")

    def evaluate(self, dimension: str, videos: Path, log: Path, *, ngpus: int) -> str:
        """The scorer's results for one dimension, as JSON.

        Raises:
            UserError: it failed; its last lines are on stderr, all of them in the log.
        """
        with tempfile.TemporaryDirectory(dir=log.parent, prefix=".") as made:
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ngpus))
            files = ("--videos_path", videos, "--full_json_dir", self.info, "--output_path", made)
            self._run([*torchrun, self.package / "launch" / "evaluate.py", "--dimension", dimension, *files], log)
            found = list(Path(made).glob(f"*{RESULTS}"))
            if len(found) != 1 or dimension not in read_result(found[0]):
                raise UserError(f"the scorer ended without a score; see {log}")
            return found[0].read_text(encoding="utf-8")

    def keep_static(self, videos: Path, out: Path, log: Path) -> None:
        """Copy the first five static videos of every prompt of temporal flickering, which are scored in place of all, to filtered_videos/.

        Raises:
            UserError: as `evaluate`.
        """
        with atomic_directory(out) as made:
            call = "from vbench.cli.vbench import main; main()"
            self._run(["-c", call, "static_filter", "--videos_path", videos, "--result_path", made], log)

    def _run(self, arguments: Sequence[str | Path], log: Path) -> None:
        with log.open("w") as output:
            command = [self.python, *arguments]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent, env=_environment())
        if done.returncode:
            last = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
            print(*last, sep="\n", file=sys.stderr)
            raise UserError(f"the scorer failed (exit status {done.returncode}); all it said is in {log}")


def _environment() -> dict[str, str]:
    """Return the environment of this process, without what would make another interpreter import this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def videos_to_score(info: Sequence[Prompt], dimension: str, videos: Path, per_prompt: int) -> list[Path]:
    """Return the videos that the scorer looks at. It only warns of a missing video, and takes the mean of the others.

    Raises:
        UserError: one is missing, or there is something else among the videos.
    """
    if not videos.is_dir():
        raise UserError(f"there is no directory {videos}; give the one that holds the mp4s")
    if strange := [entry.name for entry in videos.iterdir() if entry.suffix != ".mp4"]:
        raise UserError(f"{videos} holds {strange[0]}; keep nothing but mp4s there: VBench takes its first file's ending for that of all")
    prompts = [prompt.text for prompt in unique_prompts(info) if dimension in prompt.dimensions]
    needed = [videos / video_name(prompt, index) for prompt in prompts for index in range(per_prompt)]
    if missing := [video.name for video in needed if not video.exists()]:
        raise UserError(f"{len(missing)} of {len(needed)} videos are not in {videos}: {missing[0]!r}; make them first")
    if not needed:
        raise UserError("the info file has no prompt for it; give VBench's own")
    beyond = range(per_prompt, FLICKERING_VIDEOS if dimension == FLICKERING else 0)
    more = [videos / video_name(prompt, index) for prompt in prompts for index in beyond]
    return needed + [video for video in more if video.exists()]


def score_dimensions(
    scorer: Scorer, info: Sequence[Prompt], dimensions: Sequence[str], videos: Path, out: Path, *, per_prompt: int, ngpus: int
) -> None:
    """Score every dimension that can be scored, see `score_dimension`; those that failed are named on stderr.

    Raises:
        UserError: one or more failed.
    """
    failed = []
    for dimension in dimensions:
        try:
            score_dimension(scorer, info, dimension, videos, out, per_prompt=per_prompt, ngpus=ngpus)
        except UserError as error:  # four of the dimensions need what is hard to install: the others need not wait for that
            print(f"{dimension}: {error}", file=sys.stderr)
            failed.append(dimension)
    if failed:
        raise UserError(f"not scored: {', '.join(failed)}; the reasons are above, and the same command tries these again")


def score_dimension(
    scorer: Scorer, info: Sequence[Prompt], dimension: str, videos: Path, out: Path, *, per_prompt: int, ngpus: int
) -> None:
    """Write the results of one dimension, unless they are there and newer than its videos.

    Raises:
        UserError: videos are missing, or the scorer failed.
    """
    result = out / f"{dimension}{RESULTS}"
    looked_at = videos_to_score(info, dimension, videos, per_prompt)
    if _newer(result, looked_at):
        print(f"{dimension}: scored already", file=sys.stderr)
        return
    began = time.monotonic()
    print(f"{dimension}: {len(looked_at)} videos", file=sys.stderr)
    if dimension == FLICKERING:
        filtered, log = out.with_name(f"{out.name}_static"), out / "static_filter.log"  # beside: official scripts read every JSON in `out`
        static = filtered / "filtered_videos"
        if not _newer(static, looked_at):
            scorer.keep_static(videos, filtered, log)
        if not (kept := len(list(static.glob("*.mp4")))):
            raise UserError(f"none of its videos is static; see {log}")
        print(f"{dimension}: {kept} static videos, at most {VIDEOS_PER_PROMPT} of a prompt, are scored", file=sys.stderr)
        videos = static
    atomic_write(result, scorer.evaluate(dimension, videos, out / f"{dimension}.log", ngpus=ngpus))
    score, _ = read_result(result)[dimension]
    print(f"{dimension}: {100 * score:.2f} %, after {time.monotonic() - began:.0f} s", file=sys.stderr)


def _newer(result: Path, videos: Sequence[Path]) -> bool:
    return result.exists() and result.stat().st_mtime_ns >= max(video.stat().st_mtime_ns for video in videos)
