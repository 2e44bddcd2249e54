"""Plans of long videos: what a group takes does not grow with the video."""

from __future__ import annotations

from arcopo_fast.build import generator_sizes
from arcopo_fast.config.reading import load_config
from arcopo_fast.planning.memory import estimate

LONG = ["cache.window=12", "cache.sink=3", "rollout.horizon=2", "judge.before=6", "judge.warmup=6", "rollout.pivots_per_video=4"]


def test_a_group_takes_the_same_in_a_video_of_any_length() -> None:
    plans = []
    for chunks, more in ((20, []), (80, []), (80, ["switches.every=15"])):
        config = load_config("bench_1_3b", [*LONG, f"video.chunks={chunks}", *more])
        plans.append(estimate(config, generator_sizes(config.generator.checkpoint)))
    short, long, switching = plans
    own = {name for name in short.components if not name.startswith("evaluation") and name != "copies while judging"}
    assert {name: short.components[name] for name in own} == {name: long.components[name] for name in own}
    assert short.total("rollout") <= long.total("rollout") and short.total("update") <= long.total("update")
    tails = "keys and values of the branches"
    assert switching.components[tails] == 9 / 6 * long.components[tails], "each branch has all but the sink for itself"
