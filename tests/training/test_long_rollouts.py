"""Groups of long videos in training: prompts that change, several groups of a video, buffers, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy, deepcopy
from pathlib import Path

import pytest
import torch
from support.commands import SMALL_COPO
from support.ranks import run_ranks
from torch import Tensor

from arcopo_fast.build import load_prompts, pool_pages, switching_chunks
from arcopo_fast.config.reading import load_config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.errors import UserError
from arcopo_fast.model.lora import adapter_state, load_adapter_state
from arcopo_fast.rollout.stream import Stream
from arcopo_fast.runtime.distributed import World
from arcopo_fast.train import one_iteration
from arcopo_fast.training.buffered import policy_of, recipe_of, restore, store
from arcopo_fast.training.lessons import LearningWatch
from arcopo_fast.training.trainer import Trainer

LONG = [
    *SMALL_COPO,
    *("video.chunks=6", "video.chunk_frames=2", "sampler.steps=[1000,300]", "cache.window=6", "cache.sink=2"),
    *("rollout.horizon=1", "rollout.pivots_per_video=2", "switches.every=4", "judge.before=2", "judge.warmup=2"),
]


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(load_config("toy", LONG))


@pytest.fixture(autouse=True)
def no_page_is_left(trainer: Trainer) -> Iterator[None]:
    yield
    assert trainer.engine.pool.pages_in_use == 0


def contents(trainer: Trainer, stream: Stream | None) -> Tensor:
    assert stream is not None
    pool = trainer.engine.pool
    return torch.cat([pool.read(layer, run)[0][0] for layer in range(len(pool.keys)) for run in pool.runs(stream.cache.tables)])


def test_each_gives_the_groups_of_judged(trainer: Trainer) -> None:
    """Two groups of one video, and another video, as they are when each is made alone; so are pages given back when it stops early."""
    rollouts, pivots = trainer.rollouts, [trainer.rollouts.pivot(2, index) for index in range(4)]
    assert pivots[0] < pivots[1] <= 4 and pivots[2:] == pivots[:2], "a pivot of its own for each group of a video, shared by all videos"
    together = []
    for index, judged in rollouts.each(2, range(4)):
        together.append(judged)
        judged.group.put_away()
        if index == 2:
            break
    for index, judged in enumerate(together):
        with rollouts.judged(2, index).group as alone:
            group = judged.group
            assert group.pivot == alone.pivot == pivots[index] and group.key == alone.key and group.tails.shape[1] == 4
            torch.testing.assert_close(group.tails, alone.tails, rtol=0, atol=1e-4)
            assert judged.prompt == rollouts.prompt(2, index) and [turn.frame for turn in judged.prompt.turns] == [4, 8]
    assert rollouts.prompt(2, 0) == rollouts.prompt(2, 1) != rollouts.prompt(2, 2)


def test_a_buffer_keeps_what_makes_the_context_again(trainer: Trainer, tmp_path: Path) -> None:
    """Events, and of the latents only what they need; an entry of the first format is a whole video under one prompt."""
    config, generator, engine, objective = trainer.config, trainer.generator, trainer.engine, trainer.objective
    policy = policy_of(config, generator, objective)
    assert policy["horizon"] == 1 and policy["switches"] == {"every": 4}
    judged = trainer.rollouts.judged(1, 1)
    buffer = Buffer.create(tmp_path, policy, recipe_of(config, trainer.prompts, trainer.rewards), groups=1)
    for index in buffer.missing(1):
        buffer.write(index, *store(judged, engine.shape))
    entry = buffer.read(0)
    kinds = [event[0] for event in entry.metadata["events"]]
    assert entry.metadata["fork"] == 1 and kinds.count("switch") >= 1
    assert len(entry.tensors["prefix"]) == 2 * kinds.count("append")
    restored = restore(entry, generator, engine, objective, list(config.rewards))
    with judged.group as made, restored.group as group:
        torch.testing.assert_close(contents(trainer, group.prefix), contents(trainer, made.prefix), rtol=0, atol=1e-4)
        assert torch.equal(group.text, made.text) and group.key == made.key and restored.prompt == judged.prompt
        assert list(group.switches) == list(made.switches)


def test_a_run_that_goes_on_has_the_same_iterations(trainer: Trainer) -> None:
    watch, start = LearningWatch(trainer.config), {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}
    one_iteration(trainer, watch, 1)
    weights = {name: tensor.clone() for name, tensor in adapter_state(trainer.generator.model).items()}
    state = deepcopy(trainer.optimizer.state_dict())
    whole = one_iteration(trainer, watch, 2)
    load_adapter_state(trainer.generator.model, weights)
    trainer.optimizer.load_state_dict(state)
    again = one_iteration(trainer, LearningWatch(trainer.config), 2)
    assert whole.pop("time") and again.pop("time") and whole == again and whole["update1/ratio_max"] == 0
    load_adapter_state(trainer.generator.model, start)


def learned(world: World, *settings: str) -> tuple[dict[str, float], Tensor]:
    """Return what an iteration logs, and all of the adapter after it."""
    trainer = Trainer(load_config("toy", [*LONG, *settings]), world)
    record = one_iteration(trainer, LearningWatch(trainer.config), 1)
    assert trainer.engine.pool.pages_in_use == 0 and len(trainer.own_groups) == 2
    weights = torch.cat([tensor.flatten().double() for tensor in adapter_state(trainer.generator.model).values()])
    return {name: value for name, value in record.items() if name != "time"}, weights


def test_ranks_that_share_the_groups_of_a_video() -> None:
    """Each makes the video itself, and branches of its own; they learn what one process does."""
    (record, weights), (other_record, other_weights) = run_ranks(2, learned, "train.spread=branches")
    alone, expected = learned(World())
    assert record == other_record and torch.equal(weights, other_weights)
    assert record.keys() == alone.keys() and record["pivot"] == alone["pivot"]
    assert (weights - expected).norm() <= 1e-4 * expected.norm()


def test_a_set_of_prompts_that_change(tmp_path: Path) -> None:
    """Records of a .jsonl say when; pages are planned for the changes within a horizon, and what does not fit the video is refused."""
    records = [{"prompts": [f"a red ball {number}", "a blue ball"], "frames": [0, frame]} for number, frame in enumerate((4, 6, 6))]
    source = tmp_path / "segments.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    settings = [*LONG, "switches.every=null", f"prompts={source}", "evaluation.prompts=1"]
    config = load_config("toy", settings)
    assert {prompt.turns[0].frame for part in load_prompts(config) for prompt in part} == {4, 6}
    assert switching_chunks(config) == [(2,), (3,)] and switching_chunks(load_config("toy", LONG)) == [(2, 4)]
    assert pool_pages(config) > pool_pages(load_config("toy", [*LONG, "switches.every=null"]))
    with pytest.raises(UserError, match="switches.every changes prompts, and so does"):
        load_prompts(load_config("toy", [*settings, "switches.every=4"]))
    with pytest.raises(UserError, match="counts from latent frame 6 on, and the video's last chunk begins at 4"):
        load_prompts(load_config("toy", [*settings, "video.chunks=3"]))


@pytest.mark.parametrize(
    "settings, problem",
    [
        (["rollout.horizon=6"], "leaves no pivot in a video of L = 6 chunks; give at most 5"),
        (["rollout.pivot=6", "rollout.pivots_per_video=1"], "with a horizon of 1; give 1 to 5"),
        (["rollout.pivot=2"], "rollout.pivots_per_video 2 .* set rollout.pivot=shared"),
        (["rollout.pivots_per_video=8"], "leaves 5; give at most 5"),
        (["switches.every=1"], "changes the prompt within a chunk of 2 latent frames"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config("toy", [*LONG, *settings])


def test_of_a_long_video_what_rewards_see_is_still_there(trainer: Trainer) -> None:
    """Under its prompts, though the group has forgotten what lies before the warm-up."""
    rollouts, index = trainer.rollouts, next(index for index in range(100) if trainer.rollouts.pivot(index // 2, index % 2) == 4)
    keeping = copy(rollouts)
    keeping.config = trainer.config.model_copy(update={"judge": load_config("toy", [*LONG[:-1], "judge.warmup=all"]).judge})
    made = [source.roll_out(source.encode(source.prompt(index // 2, index % 2)), index // 2, index % 2) for source in (rollouts, keeping)]
    with made[0] as group, made[1] as whole:
        (view, shared, tails), (exact, prefix, _) = rollouts.seen(group), keeping.seen(whole)
        assert (view.frames, view.warmup, exact.warmup) == (range(6, 12), 2, 6) and group.prefix_latents.shape[1] < prefix.shape[1] == 8
        assert torch.equal(shared, prefix[:, 4:]) and torch.equal(tails, whole.tails)
        prompt = rollouts.prompt(index // 2, index % 2)
        texts = [prompt.turns[0].prompt.text, prompt.turns[1].prompt.text]
        assert [(part.frames, part.prompt) for part in rollouts.view(group, prompt).windows[0].parts] == [
            (range(6, 8), texts[0]),
            (range(8, 12), texts[1]),
        ]
