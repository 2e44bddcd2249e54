"""The reference path and the engine are one algorithm: latents, rewards, advantages, gradients, statistics and weights are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from arcopo_kernels.testing import error_ratio
from support.models import random_text, small_model
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.model.lora import BLOCK_TARGETS, adapter_parameters, add_lora
from benchmarks.iteration import OurPath, ReferencePath, Scene, agreement, changed
from benchmarks.reference import wan
from benchmarks.reference.iteration import Reference, Result, through_mp4

# The first update moves the ratios of the second one by a few hundredths: some leave the clip, others do not.
CONFIG = load_config(
    "bench_1_3b",
    [
        *("video.chunks=3", "video.chunk_frames=2", "video.independent_first_frame=true", "video.latent_height=4", "video.latent_width=6"),
        *("sampler.steps=[1000, 750, 500]", "sampler.first_chunk_steps=[1000, 600]", "sampler.context_noise=10"),
        *("rollout.group_size=4", "rollout.noise_strength=0.7", "rollout.branches_per_wave=null", "objective.micro_batch=null"),
        *("objective.anchors_per_update=3", "objective.clip=2e-2", "objective.tau=0.7"),
        *("lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-3"),
    ],
)
POLICIES = {"global": {}, "window": {"window": 4}, "window and sink": {"window": 5, "sink": 1}}


def scene_of(dtype: torch.dtype = torch.float64, **sections: dict[str, object]) -> Scene:
    model = add_lora(small_model(dtype), rank=4, alpha=8, targets=BLOCK_TARGETS, seed=1, dtype=torch.promote_types(dtype, torch.float32))
    with torch.no_grad():  # an adapter in the middle of training: B is not zero any more
        for parameter in adapter_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Scene("small", changed(CONFIG, **sections), model, random_text(), "")


def run(path: OurPath | ReferencePath, advantages: Tensor) -> tuple[Result, list[list[Tensor]]]:
    """An iteration, and the clipped gradients of each of its updates."""
    gradients: list[list[Tensor]] = []
    optimizer = path.optimizer if isinstance(path, OurPath) else path.reference.optimizer
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in path.parameters if p.grad is not None]))
    return path.iteration(advantages), gradients


def both(scene: Scene, pivot: int) -> tuple[OurPath, ReferencePath]:
    return OurPath(scene.copy(), pivot), ReferencePath(scene.copy(), pivot)


# float64: what is left is the order of sums. float32: rounding over a chain of 9 to 12 chunk forwards of two layers.
BUDGETS = {
    torch.float64: {"latents": 1e-13, "gradients": 1e-11, "weights": 1e-11, "statistics": 1e-11},
    torch.float32: {"latents": 5e-6, "gradients": 2e-3, "weights": 5e-4, "statistics": 2e-3},
}


@pytest.mark.parametrize("dtype", BUDGETS, ids=str)
@pytest.mark.parametrize("cache", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("pivot", [0, 2, 3])
def test_the_two_paths_are_one_algorithm(dtype: torch.dtype, cache: dict[str, object], pivot: int) -> None:
    scene, budget = scene_of(dtype, cache=cache), BUDGETS[dtype]
    advantages = torch.randn(4, dtype=torch.float64)
    paths = both(scene, pivot)
    (ours, our_gradients), (theirs, their_gradients) = (run(path, advantages) for path in paths)
    assert error_ratio(ours.latents, theirs.latents) <= budget["latents"]
    assert len(our_gradients) == len(their_gradients) == 2
    names = [name for name, p in paths[0].scene.model.named_parameters() if p.requires_grad]
    assert len(our_gradients[0]) == len(their_gradients[0]) == len(names), "every adapter has a gradient, the text's keys and values too"
    for update, (a, b) in enumerate(zip(our_gradients, their_gradients)):
        size = torch.cat([gradient.flatten() for gradient in b]).double().square().mean().sqrt()
        for name, x, y in zip(names, a, b):
            assert (x - y).double().square().mean().sqrt() <= budget["gradients"] * size, f"update {update + 1}, {name}"
    for name, x, y in zip(names, paths[0].parameters, paths[1].parameters):
        assert error_ratio(x, y) <= budget["weights"], name
    assert ours.statistics["update1/ratio_max"] == 0 and theirs.statistics["update1/ratio_max"] == 0
    assert ours.statistics["update2/ratio_max"] > 0
    assert ours.statistics.keys() - theirs.statistics.keys() == {"zero_variance_groups", "steps", "clipped", "below_eps"}
    for name, value in theirs.statistics.items():
        assert ours.statistics[name] == pytest.approx(value, rel=budget["statistics"], abs=1e-12), name


@pytest.mark.parametrize("pivot", [0, 1])
def test_with_the_vae_and_the_rewards(pivot: int) -> None:
    from benchmarks.bench_iteration import SMALL, scene_of

    ours, reference = both(scene_of(SMALL), pivot)
    errors = agreement(ours, reference)
    assert errors["latents"] < 1e-4 and errors["rewards"] < 1e-3 and errors["adapter"] < 1e-2
    assert ours.engine.pool.peak_in_use == ours.plan.pages


def corrupt_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation = wan.ReferenceWan.rotation
    monkeypatch.setattr(wan.ReferenceWan, "rotation", lambda self, frame, grid: rotation(self, frame + frame // 3, grid))


def corrupt_clean_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    call = wan.ReferenceWan.__call__

    def without(self: wan.ReferenceWan, x: Tensor, timestep: float, *rest: object, **more: object) -> Tensor:
        return x if timestep == 10.0 else call(self, x, timestep, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(wan.ReferenceWan, "__call__", without)


@pytest.mark.parametrize("corrupt", [corrupt_positions, corrupt_clean_pass])
def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch, corrupt: object) -> None:
    ours, reference = both(scene_of(torch.float32), 1)
    corrupt(monkeypatch)  # type: ignore[operator]
    with pytest.raises(AssertionError, match="error ratio of latents"):
        agreement(ours, reference)


def test_some_branches_stand_for_all() -> None:
    scene = scene_of()
    whole = Reference(scene.config, scene.model).rollout(scene.text, scene.noise, 1)
    part = Reference(scene.config, scene.model).rollout(scene.text, scene.noise, 1, branches=3)
    assert part.predictions.shape == whole.predictions.shape and part.latents.shape == whole.latents.shape
    assert torch.equal(part.latents[:3], whole.latents[:3]) and torch.equal(part.latents[3], whole.latents[0])


def test_the_reference_writes_no_gradient_into_its_cache() -> None:
    scene = scene_of()
    reference = Reference(scene.config, scene.model)
    candidates = reference.rollout(scene.text, scene.noise, 1)
    before = copy.deepcopy(reference.cache.keys)
    reference.replay(candidates, scene.text, 1, step=0, anchor=2).sum().backward()
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, reference.cache.keys))


@pytest.mark.parametrize(
    "change", [{"objective": {"tau": "auto"}}, {"objective": {"steps": 0.6}}, {"sampler": {"kind": "ode"}}, {"cache": {"variant": "krea"}}]
)
def test_what_the_reference_lacks_is_said(change: dict[str, dict[str, object]]) -> None:
    scene = scene_of(**change)
    with pytest.raises(ValueError, match="the reference path has"):
        Reference(scene.config, scene.model)


def test_frames_survive_an_mp4() -> None:
    pytest.importorskip("av")
    coarse = torch.rand(9, 3, 4, 4)
    frames = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear").unsqueeze(0)
    back = through_mp4(frames)
    assert back.shape == frames.shape and back.dtype == torch.float32
    assert 0 < (back - frames).abs().mean() < 0.1
