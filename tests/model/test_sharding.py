"""Weights divided among ranks compute what whole ones do, take 1 / ranks of the memory, and never lie whole on a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.measure import LiveBytes
from support.models import random_text, small_config, small_engine, small_model
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from arcopo_fast.build import load_generator, load_model, read_model
from arcopo_fast.config.reading import load_config
from arcopo_fast.errors import RankLost, UserError
from arcopo_fast.model.adapter_files import Adapter
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.model.checkpoints import read_state_dict, save_transformer
from arcopo_fast.model.families import published
from arcopo_fast.model.lora import (
    BLOCK_TARGETS,
    adapter_disabled,
    adapter_parameters,
    adapter_state,
    add_lora,
    frozen_state,
    write_adapter,
)
from arcopo_fast.model.sharding import load_sharded, shard
from arcopo_fast.model.untrained import untrained_wan, untrained_weights
from arcopo_fast.rollout.noise import GroupId, NoisePlan
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.identity import sampled_digest

SIZES = {"num_layers": 3, "ffn_dim": 42}  # 4 ranks do not divide 42 rows evenly
SHAPE = VideoShape((2,) * 3, 8, 4, 6)
MEMBERS = 3
CPU = torch.device("cpu")
CASES = {
    "float32": (torch.float32, BLOCK_TARGETS),
    "bfloat16": (torch.bfloat16, BLOCK_TARGETS),
    "one layer": (torch.float32, ("ffn.net.2",)),
    "everywhere": (torch.float32, (*BLOCK_TARGETS, "proj_out", "condition_embedder.text_embedder.linear_1")),
}
"""The dtype of the weights, and the layers that are adapted."""
TOY = load_config("toy", ["generator.shard=true", "generator.dtype=bfloat16"])
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nMore lines")

# On the ranks ----------------------------------------------------------------------------------------------------------------------


def divided(world: World, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32, **lora: Any) -> CausalWan:
    adapt = partial(add_lora, **{"rank": 4, "alpha": 8, "seed": 1, "device": CPU} | lora)
    return load_sharded(small_config(**SIZES), weights, adapt, world, dtype=dtype, device=CPU, source="weights.pt")


class Watch:
    """Counts the blocks whose weights are whole while the network works."""

    def __init__(self, model: CausalWan) -> None:
        self.model, self.most = model, 0
        for block in model.blocks:
            block.attn1.norm_q.register_forward_hook(self)
        for parameter in adapter_parameters(model):
            parameter.register_hook(self)

    def __call__(self, *_: object) -> None:
        whole = sum(not isinstance(block.scale_shift_table, DTensor) for block in self.model.blocks)
        self.most = max(self.most, whole)


def learnt(model: CausalWan) -> dict[str, Tensor]:
    """Everything that a rollout, replays with gradient and a step of training make, by name."""
    torch.manual_seed(0)
    engine, text = small_engine(model, branches=MEMBERS, shape=SHAPE), random_text()
    parameters, names = adapter_parameters(model), list(adapter_state(model))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    made: dict[str, Tensor] = {}
    with engine.rollout(text, GroupId(seed=3), pivot=1, members=MEMBERS, plan=NoisePlan(0.5)) as group:
        made |= {"prefix": group.prefix_latents, "tails": group.tails, "predictions": group.predictions}
        samples = group.samples(torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]))
        with adapter_disabled(model):
            made["reference"] = engine.predict(group, samples).detach()
        for checkpoint in (False, True):
            prediction = engine.predict(group, samples, checkpoint=checkpoint)
            made[f"replay, {checkpoint=}"] = prediction.detach()
            optimizer.zero_grad()
            (prediction * torch.linspace(-1, 1, prediction.numel()).view_as(prediction)).sum().backward()
            made |= {f"gradient of {name}, {checkpoint=}": cast(Tensor, parameter.grad) for name, parameter in zip(names, parameters)}
    optimizer.step()
    return made | {f"trained {name}": tensor.clone() for name, tensor in adapter_state(model).items()}


def compared(world: World, dtype: torch.dtype, targets: tuple[str, ...]) -> dict[str, Any]:
    torch.manual_seed(5)
    whole = small_model(dtype, **SIZES)
    model = divided(world, whole.state_dict().items(), dtype, targets=targets)
    watch = Watch(model)
    ours, expected = learnt(model), learnt(add_lora(whole, rank=4, alpha=8, seed=1, targets=targets))
    assert list(ours) == list(expected)
    plain = all(type(parameter) is torch.nn.Parameter and parameter.dtype == torch.float32 for parameter in adapter_parameters(model))
    return {
        "error": {name: ((t - expected[name]).abs().max() / expected[name].abs().max()).item() for name, t in ours.items()},
        "plain": plain and all(not parameter.requires_grad for parameter in model.parameters() if isinstance(parameter, DTensor)),
        "trained": {name: tensor for name, tensor in ours.items() if name.startswith("trained")},
        "whole at once": watch.most,
    }


def measured(model: CausalWan) -> int:
    """Bytes of this rank's pieces."""
    return sum(tensor.to_local().untyped_storage().nbytes() for tensor in frozen_state(model).values() if isinstance(tensor, DTensor))


def from_file(world: World, path: Path) -> dict[str, Any]:
    state = read_state_dict(path)
    with LiveBytes(state.values(), real=True) as live:
        model = divided(world, state.items(), rank=1)
    adapters = sum(parameter.nbytes for parameter in adapter_parameters(model))
    return {"digest": sampled_digest(frozen_state(model).items()), "pieces": measured(model), "peak": live.peak - adapters}


def loaded(world: World, directory: Path) -> dict[str, str]:
    """Digests of what other ways of loading give."""
    _, folded = read_model(directory / "model", lora=directory / "adapter")
    models = {
        "folded": divided(world, folded),
        "untrained": divided(world, untrained_weights(small_config(**SIZES), dtype=torch.bfloat16, device=CPU, seed=4), torch.bfloat16),
        "toy": load_generator(TOY, adapted=True, world=world).model,
    }
    assert all(model.ranks == world.size for model in models.values())
    assert load_generator(TOY, world=world).model.ranks == 1, "only what is trained is divided"
    return {name: sampled_digest(frozen_state(model).items()) for name, model in models.items()}


def large(world: World) -> int:
    """Bytes of this rank's pieces of the 14B generator, in bfloat16."""
    with torch.device("meta"):
        model = CausalWan(published("14b").transformer).to(torch.bfloat16)
    shard(model.requires_grad_(False), world, CPU)
    return measured(model)


def refused(world: World) -> dict[str, str]:
    """What is said where weights cannot be used."""
    state = dict(small_model(**SIZES).state_dict())
    first, second = "blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight"
    others = {name: tensor for name, tensor in state.items() if name != first} | {second: torch.zeros(3, 5), "more": torch.zeros(3)}
    broken = state | {first: state[first].clone()}
    broken[first][-1] = math.nan  # only the last rank reads this row
    said = {}
    for what, weights in {"others": others, "broken": broken}.items():
        try:
            divided(world, weights.items())
        except UserError as error:
            said[what] = str(error)
    model = divided(world, state.items())
    engine = small_engine(model, branches=MEMBERS)
    model.forward = lambda *_, **__: (_ for _ in ()).throw(OUT_OF_MEMORY)  # type: ignore[method-assign]
    for members in (MEMBERS, 1):
        try:
            engine.rollout(random_text(), GroupId(seed=3), pivot=0, members=members, plan=NoisePlan(0.5))
        except UserError as error:
            said[f"{members} branches"] = str(error)
    return said


def everything(world: World, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"files": {path.name: from_file(world, path) for path in (directory / "model", directory / "weights.pt")}}
    found["large"] = large(world)
    if world.size == 2:
        found |= {"loaded": loaded(world, directory), "refused": refused(world)}
    cases = list(CASES)[: 1 if world.size > 2 else None]  # four processes take their time
    return found | {"compared": {case: compared(world, *CASES[case]) for case in cases}}


# The tests -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> CausalWan:
    return small_model(**SIZES)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, whole: CausalWan) -> Path:
    """The same weights in a file that is mapped tensor by tensor, and in one of PyTorch's; and an adapter of them."""
    directory = tmp_path_factory.mktemp("weights")
    save_transformer(directory / "model", whole.state_dict(), whole.config.to_dict())
    torch.save(whole.state_dict(), directory / "weights.pt")
    name = "blocks.1.attn1.to_k"
    state = {f"{name}.lora_A.weight": torch.randn(2, 24), f"{name}.lora_B.weight": torch.randn(24, 2)}
    write_adapter(directory / "adapter", Adapter(state, 2, 4.0))
    return directory


@pytest.fixture(scope="module")
def digests(whole: CausalWan, directory: Path) -> dict[str, str]:
    """What is expected of each way of loading, by whole weights."""
    models = {
        "file": whole,
        "untrained": untrained_wan(whole.config, dtype=torch.bfloat16, device="cpu", seed=4),
        "folded": load_model(directory / "model", lora=directory / "adapter"),
        "toy": load_generator(TOY, adapted=True).model,
    }
    assert all(model.ranks == 1 for model in models.values()), "one process has no others"
    return {name: sampled_digest(frozen_state(model).items()) for name, model in models.items()}


@pytest.fixture(scope="module")
def two(directory: Path, digests: dict[str, str]) -> list[dict[str, Any]]:
    import torch._dynamo  # noqa: F401 - which takes seconds: once, and not on every rank

    return run_ranks(2, everything, directory)


@pytest.fixture(scope="module")
def four(two: object, directory: Path) -> list[dict[str, Any]]:
    return run_ranks(4, everything, directory)


@pytest.fixture(scope="module", params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


def test_it_computes_what_whole_weights_do_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    """A rollout, replays with and without checkpointing, their gradients, and a step of AdamW.

    Only the gradient of the text's embedding, if it is adapted, is summed in another order: a block's keys and values together first.
    """
    assert len(ranks[0]["compared"]) == (len(CASES) if len(ranks) == 2 else 1)
    for rank in ranks:
        for case, found in rank["compared"].items():
            assert len(found["error"]) > 10
            for name, error in found["error"].items():
                assert error <= (1e-5 if "text_embedder" in name else 0), (case, name)
            assert found["plain"], "adapters are plain float32 parameters, and nothing else can be trained"
            same = ranks[0]["compared"][case]["trained"]
            assert all(torch.equal(tensor, same[name]) for name, tensor in found["trained"].items())


def test_one_block_is_whole_at_a_time(ranks: list[dict[str, Any]]) -> None:
    """In the forward and the backward pass, and in that of the text's keys and values."""
    assert {found["whole at once"] for rank in ranks for found in rank["compared"].values()} == {1}


def test_a_rank_holds_its_part_and_never_the_whole(ranks: list[dict[str, Any]], whole: CausalWan) -> None:
    """Also while it loads. Where ranks do not divide the rows of a weight evenly, pieces are filled up, as tables of one row are."""
    size, weights = len(ranks), frozen_state(whole).values()
    part = sum(math.ceil(len(weight) / size) * weight[0].nbytes for weight in weights)
    total, largest = sum(weight.nbytes for weight in weights), max(weight.nbytes for weight in weights)
    assert part < 1.06 * total / size
    for rank in ranks:
        for found in rank["files"].values():
            assert found["pieces"] == part <= found["peak"] <= part + 2 * largest / size + 4096


def test_a_large_generator_is_divided_evenly(ranks: list[dict[str, Any]]) -> None:
    with torch.device("meta"):
        total = sum(2 * parameter.numel() for parameter in CausalWan(published("14b").transformer).parameters())
    assert total > 28e9
    for rank in ranks:
        assert 1 <= rank["large"] / (total / len(ranks)) < 1.001


def test_the_digest_is_that_of_whole_weights(ranks: list[dict[str, Any]], digests: dict[str, str]) -> None:
    """By which runs and buffers are compared: a run goes on with whole weights, or divided ones."""
    assert len(set(digests.values())) == len(digests)
    assert {found["digest"] for rank in ranks for found in rank["files"].values()} == {digests["file"]}


def test_every_way_of_loading_gives_the_same_weights(two: list[dict[str, Any]], digests: dict[str, str]) -> None:
    for rank in two:
        assert {"file": digests["file"]} | rank["loaded"] == digests


def test_every_rank_says_what_one_has_found(two: list[dict[str, Any]]) -> None:
    for rank in two:
        said = rank["refused"]
        assert all("\n" not in line for line in said.values())
        assert "weights.pt does not fit CausalWan: 1 missing (blocks.0.attn1.to_q.weight); 1 unexpected (more)" in said["others"]
        assert "blocks.1.attn1.to_q.weight [3, 5] instead of [24, 24]" in said["others"]
        assert said["broken"].startswith("weights.pt: blocks.0.attn1.to_q.weight holds values that are not finite")
        assert said["3 branches"].startswith("a wave of 3 branches ran out of memory (CUDA out of memory. Tried to allocate 3.00 GiB.); ")
        assert "generator.shard" in said["3 branches"] and said["3 branches"].endswith("set rollout.branches_per_wave=2")
        assert "generator.offload=true" in said["1 branches"]


def left(world: World) -> None:
    """Rank 1 leaves where rank 0 begins a pass."""
    model = divided(world, small_model(**SIZES).state_dict().items())
    if world.is_main:
        model.encode_text(random_text())


def test_a_rank_that_is_lost_is_the_cause() -> None:
    lost, _ = run_ranks(2, left)
    assert isinstance(lost, RankLost) and str(lost).startswith("another rank has ended or does not answer; its own error, ")
