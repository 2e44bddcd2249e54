"""Captured denoising loops give what the plain loop gives, whatever changes between calls; tested without a GPU by a stand-in for capture.

The stand-in runs the captured closure again, with whatever it closed over when it was captured, and writes into the same outputs: what a
graph does. So a replay is right only if everything that changes is copied in or part of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from arcopo_kernels import PagePool
from support.models import SHAPE, random_text, small_engine, small_model
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig
from arcopo_fast.model.causal_wan import TextContext
from arcopo_fast.model.lora import adapter_disabled, adapter_parameters, add_lora
from arcopo_fast.model.sizes import CausalWanConfig
from arcopo_fast.objectives.sde_grpo import SdeGrpoObjective, SdeGrpoSettings
from arcopo_fast.rollout import graphs
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.graphs import ChunkGraphs, Function, launch_bound
from arcopo_fast.rollout.group import Group
from arcopo_fast.rollout.noise import GroupId, KeyedNoise, NoisePlan
from arcopo_fast.rollout.sampler import Trajectory

GROUP = 3


class Captures:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, function: Function) -> tuple[Sequence[Tensor], Callable[[], object]]:
        self.captured += 1
        outputs = [output.clone() for output in function()]

        def replay() -> None:
            self.replayed += 1
            with pytest.MonkeyPatch.context() as patch:  # a graph reads addresses: no host code asks whether a plan is stale
                patch.setattr(PagePool, "_check", lambda pool, run: setattr(run, "readable", True))
                for output, fresh in zip(outputs, function()):
                    output.copy_(fresh)

        return outputs, replay


def rollout(engine: Engine, text: Tensor, iteration: int, pivot: int, seed: int = 7) -> Group:
    noise = KeyedNoise(SHAPE, GroupId(seed=seed, iteration=iteration))
    with engine.rollout(text, noise.id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5)) as group:
        return group


def engines(policy: CacheConfig | None = None, **options: object) -> tuple[Engine, Engine, Captures]:
    """Two of one model: with graphs and without."""
    model = small_model()
    graphed, plain = (small_engine(model, cache=policy or CacheConfig(), branches=GROUP) for _ in range(2))
    captures = Captures()
    graphed.graphs = ChunkGraphs("on", capture=captures, **options)  # type: ignore[arg-type]
    return graphed, plain, captures


POLICIES = {
    "global": CacheConfig(),
    "sink": CacheConfig(window=4, sink=1),
    "unroped": CacheConfig(variant="longlive_infinity", window=6, sink=2),
    "krea": CacheConfig(variant="krea", window=4, sink=1),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_replayed_rollouts_equal_plain_ones(policy: CacheConfig) -> None:
    graphed, plain, captures = engines(policy)
    for iteration in range(6):
        text, pivot = random_text(), iteration % SHAPE.chunks
        ours, theirs = (rollout(engine, text, iteration, pivot) for engine in (graphed, plain))
        assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.predictions, theirs.predictions)
        assert torch.equal(ours.videos(), theirs.videos())
    assert captures.captured and captures.replayed > captures.captured, "places must come back, and their graphs with them"


def test_a_graph_sees_new_weights() -> None:
    graphed, plain, captures = engines()
    add_lora(graphed.model, rank=2, alpha=4, targets=["to_q", "to_v"], seed=0)
    text = random_text()
    before = rollout(graphed, text, 0, 1)
    rollout(graphed, text, 0, 1)
    with torch.no_grad():
        for parameter in adapter_parameters(graphed.model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    replays = captures.replayed
    after = rollout(graphed, text, 0, 1)
    assert captures.replayed > replays
    assert not torch.equal(after.predictions, before.predictions)
    assert torch.equal(after.predictions, rollout(plain, text, 0, 1).predictions)


def test_with_and_without_adapter_are_two_graphs() -> None:
    """Which operations run is decided by the host, and a graph has only those that it was captured with."""
    graphed, plain, captures = engines()
    add_lora(graphed.model, rank=2, alpha=4, targets=["to_q", "to_v"], seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(graphed.model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    text = random_text()
    for _ in range(2):
        adapted = rollout(graphed, text, 0, 1)
    captured = captures.captured
    with adapter_disabled(graphed.model):
        for _ in range(2):
            base = rollout(graphed, text, 0, 1)
        assert captures.captured == 2 * captured > 0
        assert torch.equal(base.predictions, rollout(plain, text, 0, 1).predictions)
    assert torch.equal(rollout(graphed, text, 0, 1).predictions, adapted.predictions)
    assert captures.captured == 2 * captured and not torch.equal(base.predictions, adapted.predictions)


def test_results_of_one_call_survive_the_next() -> None:
    graphed, _, _ = engines()
    text = random_text()
    for _ in range(2):
        first = rollout(graphed, text, 0, 1)
    kept = [tensor.clone() for tensor in (first.predictions, first.prefix_latents, first.tails)]
    rollout(graphed, random_text(), 1, 1)
    assert all(torch.equal(a, b) for a, b in zip((first.predictions, first.prefix_latents, first.tails), kept))


def test_a_place_is_pages_and_positions() -> None:
    engine = small_engine(small_model(), cache=CacheConfig(window=6))
    stream = engine.rebuild_prefix(random_text(), torch.randn(1, 2, 8, 4, 6))
    contexts = [stream.cache.context(frame, 2, keep=False) for frame in (2, 2, 4)]
    assert contexts[0].addresses() == contexts[1].addresses() != contexts[2].addresses()
    assert stream.cache.context(4, 2, keep=True).addresses() is None
    assert stream.cache.context(4, 2, keep=False).addresses() != contexts[2].addresses()
    stream.cache.release()


def test_more_places_than_graphs_do_not_capture_in_turn() -> None:
    """Each of the graphs there is room for is captured once, and used from then on; the other places run without."""
    graphed, plain, captures = engines(limit=2, patience=3)
    text = random_text()
    for _ in range(5):
        group = rollout(graphed, text, 0, 0)
    assert captures.captured == len(graphed.graphs._graphs) == 2 and captures.replayed == 2 * 4
    assert graphed.graphs.reason == "all 2 graphs are in use"
    assert torch.equal(group.predictions, rollout(plain, text, 0, 0).predictions)
    graphed.graphs.limit = 32
    rollout(graphed, text, 0, 0)
    assert captures.captured == SHAPE.chunks == 4


@pytest.mark.parametrize("places", [3, 20, 40])
def test_places_in_a_cycle_keep_the_graphs_they_have(places: int) -> None:
    """However long the cycle is beside limit and patience."""
    captures = Captures()
    graphed = ChunkGraphs("on", limit=4, patience=2, capture=captures)
    noise, text = torch.randn(2), TextContext([torch.randn(1)], [torch.randn(1)])
    for _ in range(5):
        for place in range(places):
            loop = lambda noise, fresh, text, place=place: Trajectory([noise - place], [noise + place])  # noqa: E731
            made = graphed._run(place, loop, noise, [], text)
            assert torch.equal(made.inputs[0], noise - place) and torch.equal(made.predictions[0], noise + place)
    kept = min(places, 4)
    assert captures.captured == kept and captures.replayed == 4 * kept


def test_a_graph_without_use_makes_room() -> None:
    graphed, _, captures = engines(limit=SHAPE.chunks, patience=3)
    text = random_text()
    for _ in range(2):
        rollout(graphed, text, 0, 0)
    former = [*graphed.graphs._graphs]
    assert captures.captured == len(former) == 4
    add_lora(graphed.model, rank=2, alpha=4, targets=["to_q"], seed=0)  # another network: other places
    for _ in range(2):
        rollout(graphed, text, 0, 0)
    assert captures.captured == 4 and graphed.graphs.reason == "all 4 graphs are in use", "at most eleven calls ago"
    for _ in range(2):
        rollout(graphed, text, 0, 0)
    assert captures.captured == 8 and not {*former} & {*graphed.graphs._graphs} and graphed.graphs.reason is None


def test_keys_seen_are_forgotten_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_KEYS_SEEN", 2)
    graphed, _, captures = engines()
    text = random_text()
    for _ in range(3):
        rollout(graphed, text, 0, 0)  # four keys, of which none is remembered until it comes back
    assert captures.captured == 0 and len(graphed.graphs._last_seen) == 2


def test_the_steps_noise_may_be_shared_or_each_branchs_own() -> None:
    """A window of one chunk leaves the last chunk where a chunk before it lay: what differs is the noise alone."""
    graphed, plain, captures = engines(CacheConfig(window=2))
    rule, text = SdeGrpoObjective(graphed, SdeGrpoSettings()).rule, random_text()
    for iteration, pivot in product(range(3), range(SHAPE.chunks)):
        noise = KeyedNoise(SHAPE, GroupId(seed=7, iteration=iteration))
        groups = [engine.rollout(text, noise.id, pivot=pivot, members=GROUP, plan=NoisePlan(0.5, rule)) for engine in (graphed, plain)]
        with groups[0] as ours, groups[1] as theirs:
            assert torch.equal(ours.predictions, theirs.predictions)
            assert torch.equal(ours.videos(), theirs.videos())
    assert captures.replayed


def test_a_failed_capture_is_said_and_costs_nothing_but_time() -> None:
    graphed, plain, _ = engines()

    def fail(function: Function) -> tuple[Sequence[Tensor], Callable[[], object]]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed.graphs = ChunkGraphs("on", capture=fail)
    text = random_text()
    for _ in range(3):
        group = rollout(graphed, text, 0, 1)
    assert torch.equal(group.predictions, rollout(plain, text, 0, 1).predictions)
    assert graphed.graphs.reason is not None and "not permitted when stream is capturing" in graphed.graphs.reason


def test_reasons_for_going_without() -> None:
    graphed, _, captures = engines()
    for one, said in ((ChunkGraphs("off", capture=captures), "off"), (ChunkGraphs("on"), "on cpu, not on a GPU")):
        graphed.graphs = one
        rollout(graphed, random_text(), 0, 1)
        assert one.reason is not None and said in one.reason
    graphed.graphs, graphed.model.ranks = ChunkGraphs("on", capture=captures), 2
    rollout(graphed, random_text(), 0, 1)
    assert graphed.graphs.reason == "the weights are divided among ranks"


def test_small_models_are_launch_bound_and_large_ones_are_not() -> None:
    tiny = CausalWanConfig(num_attention_heads=4, attention_head_dim=32, ffn_dim=512, text_len=8)
    assert launch_bound(tiny, batch=12, tokens=32)
    assert launch_bound(CausalWanConfig(), batch=1, tokens=1560)
    assert not launch_bound(CausalWanConfig(), batch=1, tokens=4680)
    assert not launch_bound(CausalWanConfig(), batch=12, tokens=4680)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Real graphs: the same latents as without, and replays are what run."""
    model = small_model(torch.bfloat16).cuda()
    graphed, plain = (small_engine(model, branches=GROUP) for _ in range(2))
    graphed.graphs = ChunkGraphs("on")
    for iteration in range(4):
        text = random_text().cuda()
        ours, theirs = (rollout(engine, text, iteration, 1) for engine in (graphed, plain))
        assert torch.equal(ours.predictions, theirs.predictions)
        assert torch.equal(ours.videos(), theirs.videos())
    assert graphed.graphs.reason is None
