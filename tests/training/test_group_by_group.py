"""The memory of an iteration is that of one group, whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arcopo_fast.config.reading import load_config
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.train import one_iteration
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer

VIDEO = ["video.chunks=3", "video.chunk_frames=1", "sampler.steps=[1000, 350]"]
SMALL = [*VIDEO, "rollout.group_size=3", "objective.anchors_per_update=2", "lora.rank=4"]
GROUPS = (1, 4, 24)


def pages_in_use(groups: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The most pages of an iteration at the last pivot, and the pool's."""
    trainer = Trainer(load_config("toy", [*SMALL, "rollout.pivot=3", f"rollout.prompts_per_iteration={groups}"]))
    pool, most = trainer.engine.pool, 0
    extend, predict = Engine.extend, Engine.predict

    def seen() -> None:
        nonlocal most
        most = max(most, pool.pages_in_use)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "extend", lambda *given, **named: (extend(*given, **named), seen())[0])
        patch.setattr(Engine, "predict", lambda *given, **named: (predict(*given, **named), seen())[0])
        record = one_iteration(trainer, LearningWatch(trainer.config), 1)
    assert record["steps"] == 2 and record["zero_variance_groups"] == 0 and pool.pages_in_use == 0
    return most, pool.pages


def test_pages_in_use_do_not_grow_with_the_number_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [pages_in_use(groups, monkeypatch) for groups in GROUPS]
    assert found[0][0] >= 2, "the pivot's prefix: two chunks of a frame"
    assert found == [found[0]] * len(GROUPS)


RESIDENT = """
import resource, sys
from arcopo_fast.config.reading import load_config
from arcopo_fast.runtime.memory import tune_for_cpu
from arcopo_fast.train import one_iteration
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer
tune_for_cpu(1)
trainer = Trainer(load_config("toy", sys.argv[1:]))
one_iteration(trainer, LearningWatch(trainer.config), 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_number_of_groups() -> None:
    """24 groups take at most a tenth more than two."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    peaks = []
    for groups in (2, 24):
        settings = [*SMALL, "rollout.group_size=6", "rollout.pivot=2", f"rollout.prompts_per_iteration={groups}"]
        command = [sys.executable, "-c", RESIDENT, *settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
        peaks.append(int(done.stdout))
    print(f"peak resident memory: {peaks[0] / 1024:.0f} MB with 2 groups, {peaks[1] / 1024:.0f} MB with 24")
    assert peaks[1] <= 1.1 * peaks[0]
