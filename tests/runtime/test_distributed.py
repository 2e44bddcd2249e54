"""The processes of one job."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.distributed import World
from arcopo_fast.runtime.place import Place, first_host, place_of
from tests.support.ranks import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123",
}


def test_place_by_the_launchers_variables() -> None:
    assert place_of({}) is None
    assert place_of(TORCHRUN) == Place(3, 8, 1, "node7", 29500)
    assert place_of(SLURM) == Place(9, 16, 1, "gpu07", 20123)
    assert place_of(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == Place(9, 16, 1, "10.0.0.1", 1234)
    assert place_of(TORCHRUN | SLURM) == Place(3, 8, 1, "node7", 29500)  # torchrun inside a SLURM job
    assert place_of(TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_a_command_inside_an_allocation_is_alone() -> None:
    """Salloc and sbatch set the number of tasks of the job; only srun makes several processes of one command."""
    assert place_of({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "5"}) is None
    assert place_of({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_refused(name: str) -> None:
    variables = {key: value for key, value in TORCHRUN.items() if key != name}
    with pytest.raises(UserError, match=f"{name} is .*torchrun"):
        place_of(variables)
    if name != "MASTER_ADDR":
        with pytest.raises(UserError, match=f"{name} is 'eight', which is no number"):
            place_of(TORCHRUN | {name: "eight"})


def test_first_host() -> None:
    lists = {
        "node1": "node1",
        "node1,node2": "node1",
        "node[03-05,9],gpu1": "node03",
        "a[1,4]": "a1",
        "x,node[1-2]": "x",
        "r[1-2]-ib": "r1-ib",
    }
    assert {nodes: first_host(nodes) for nodes in lists} == lists
    assert first_host("") == ""


def test_one_process_is_a_world() -> None:
    world = World()
    tensor = torch.randn(3)
    kept = tensor.clone()
    world.sum_([tensor])
    assert torch.equal(tensor, kept) and torch.equal(world.concatenated(tensor, 0, [3]), kept)
    assert world.is_main and world.alone and world.team(1) is world and [*world.mine(3)] == [0, 1, 2]
    assert world.gathered("a") == ["a"] and world.total(2) == 2 and world.any(True) and not world.any(False)
    world.meet("end")
    world.check_same("seed", 1)
    assert world.mean({"a": 1.0}) == {"a": 1.0}


def test_waiting_is_a_stage_of_its_own() -> None:
    """So an imbalance shows, whichever rank it slows down; work that others wait for and sums are not counted with it."""

    def uneven(world: World) -> dict[str, float]:
        with profiling.record(torch.device("cpu")) as seconds:
            with profiling.stage("denoise"):
                time.sleep(0.3 * world.rank)
            world.gathered("early")
            with profiling.stage("denoise"):
                time.sleep(0.3 * (1 - world.rank))
            world.meet("go on")
            world.sum_([torch.zeros(3)])
        assert seconds["wait"] > 0.25 and 0 < seconds["reduce"] < 0.2
        return world.mean(seconds)

    first, second = run_ranks(2, uneven)
    assert first == second and list(first) == ["denoise", "wait", "reduce"]
    assert 0.3 <= first["denoise"] < 0.4 and 0.25 < first["wait"] < 0.4


def _everything(world: World) -> dict[str, object]:
    torch.manual_seed(world.rank)
    tensors = [torch.randn(5, 7, dtype=torch.float64), torch.randn(1), torch.randn(40, 3, 2)]
    sums = [tensor.clone() for tensor in tensors]
    for tensor in sums[:1], sums[1:]:
        world.sum_(tensor)
    team = world.team(2)
    rows = torch.full((2, team.rank + 1, 3), float(world.rank))
    return {
        "tensors": tensors,
        "sums": sums,
        "total": world.total(world.rank),
        "any": (world.any(world.rank == 2), world.any(False)),
        "gathered": world.gathered({"rank": world.rank}),
        "main": world.from_main(f"said by {world.rank}"),
        "mine": list(world.mine(6)),
        "team": (team.rank, team.size, team.ranks, team.total(world.rank)),
        "rows": team.concatenated(rows, 1, [1, 2]),
        "alone": world.team(1).total(world.rank),
    }


def test_four_ranks() -> None:
    results = run_ranks(4, _everything)
    for rank, found in enumerate(results):
        for index, total in enumerate(found["sums"]):
            torch.testing.assert_close(total, sum(other["tensors"][index] for other in results))
            assert torch.equal(total, results[0]["sums"][index]), "the ranks' sums differ"
        assert found["total"] == 6 and found["any"] == (True, False) and found["main"] == "said by 0" and found["alone"] == rank
        assert found["gathered"] == [{"rank": other} for other in range(4)]
        first = rank - rank % 2
        assert found["team"] == (rank % 2, 2, (first, first + 1), 2 * first + 1)
        assert torch.equal(found["rows"], torch.tensor([first, first + 1, first + 1.0]).view(1, 3, 1).expand(2, 3, 3))
    assert sorted(sum((found["mine"] for found in results), [])) == list(range(6))


def _another_seed(world: World) -> None:
    world.check_same("recipe", "the same everywhere")
    world.check_same("seed", 1 if world.rank in (1, 2) else 0)


def test_what_differs_is_named_on_every_rank() -> None:
    for error in run_ranks(4, _another_seed):
        assert str(error).startswith("ranks 1, 2 of 4 have another seed than rank 0"), error


def _one_ends(world: World) -> float:
    if world.rank == 1:
        raise UserError("the disk is full")
    started = time.monotonic()
    try:
        world.sum_([torch.randn(1 << 16)])
    except RankLost as error:
        assert "its own error" in str(error)
        return time.monotonic() - started
    raise AssertionError("the sum of a lost rank")


def test_a_rank_that_ends_is_noticed_at_once() -> None:
    seconds = run_ranks(3, _one_ends)
    assert seconds[0] < 20 and seconds[2] < 20 and isinstance(seconds[1], UserError)


def _one_hangs(world: World) -> str:
    if world.rank == 2:
        time.sleep(8)
        return "awake"
    with pytest.raises(RankLost) as caught:
        world.meet("take the step")
    return str(caught.value)


def test_a_rank_that_hangs_is_named_within_the_timeout() -> None:
    first, second, third = run_ranks(3, _one_hangs, timeout=3.0)
    assert "rank 2 did not come within 3 s to take the step" in first
    assert "ended or does not answer" in second or "did not come" in second
    assert third == "awake"


def _in_turn(world: World, folder: Path) -> list[str]:
    """Machines of two processes each; the world's time-out is shorter than what rank 0 does."""
    world = replace(world, local_rank=world.rank % 2)
    with world.in_turn("download"):
        found = sorted(path.name for path in folder.iterdir())
        time.sleep(1.8 if world.is_main else 0.05 * (4 - world.rank))
        (folder / str(world.rank)).touch()
    world.meet_after_work("end")
    assert len(list(folder.iterdir())) == 4
    return found


def test_rank_0_comes_first_then_one_of_each_machine(tmp_path: Path) -> None:
    main, second, first_of_another, last = run_ranks(4, _in_turn, tmp_path, timeout=1.0)
    assert main == [] and first_of_another == ["0"] and second[:2] == last[:2] == ["0", "2"]


def _main_fails_in_its_turn(world: World) -> None:
    with world.in_turn("download"):
        time.sleep(0.5)
        raise UserError("offline" if world.is_main else "not reached")


def test_nobody_waits_for_a_turn_that_does_not_come() -> None:
    began = time.monotonic()
    main, *others = run_ranks(3, _main_fails_in_its_turn)
    assert str(main) == "offline" and all(isinstance(error, RankLost) for error in others)
    assert time.monotonic() - began < 20
