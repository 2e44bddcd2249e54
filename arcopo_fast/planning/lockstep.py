"""The recipes with which all ranks go through the network equally often, as weights that are divided among them need."""

from __future__ import annotations

from math import ceil

from arcopo_fast.config.schema import Config
from arcopo_fast.errors import UserError
from arcopo_fast.planning.memory import pairs_of
from arcopo_fast.planning.spread import Spread


def check_lockstep(config: Config, spread: Spread) -> None:
    """Raise `UserError` if some ranks would make other passes than others: a rank that does not come keeps the others waiting."""
    for problem, advice in uneven(config, spread):
        raise UserError(f"generator.shard asks for equally many passes on all ranks, but {problem}; {advice}")


def uneven(config: Config, spread: Spread) -> list[tuple[str, str]]:
    """Return what makes ranks differ in their passes, each with what to do about it."""
    rollout, (teams, ranks), problems = config.rollout, spread, []
    if rollout.prompts_per_iteration % teams:
        counts = f"rollout.prompts_per_iteration={rollout.prompts_per_iteration} does not divide evenly over {teams} teams of {ranks}"
        problems.append((counts, f"give a multiple of {teams}"))
    if teams > 1 and config.train.buffer is not None:
        advice = "take train.spread=branches, so that all ranks share each group"
        problems.append(("groups of a buffer fork at chunks of their own", advice))
    elif teams > 1 and rollout.pivot == "per_group":
        problems.append(("rollout.pivot=per_group lets groups fork at chunks of their own", "set rollout.pivot=shared"))
    if len(set(_parts(spread.branches(rollout.group_size), rollout.branches_per_wave))) > 1:
        waves = f"the {rollout.group_size} branches of a group make more waves on some of the {ranks} ranks of a team than on others"
        problems.append((waves, f"set rollout.group_size to a multiple of {ranks}, or rollout.branches_per_wave=null"))
    if config.anchored and ranks > 1:
        advice = "take train.spread=groups, or objective.advantage_baseline=mean"
        problems.append((f"one of the {ranks} ranks of a team makes the anchor of a group for all of them", advice))
    pairs = pairs_of(config)
    dealt = _parts([len(range(rank, pairs, ranks)) for rank in range(ranks)], config.objective.micro_batch)
    if len(set(dealt)) > 1:
        samples = f"the {pairs} samples of an update make more micro-batches on some of the {ranks} ranks of a team than on others"
        whole = ", or set objective.micro_batch=null" if pairs >= ranks else ""
        problems.append((samples, f"start a number of ranks that divides {pairs}{whole}"))
    if rollout.cuda_graphs == "on":
        problems.append(("a CUDA graph cannot hold the gathering of weights", "set rollout.cuda_graphs=auto or off"))
    return problems


def _parts(counts: list[int], size: int | None) -> list[int]:
    """Return the number of parts of at most `size` that each count is cut into."""
    return [ceil(count / (size or max(counts))) for count in counts]
