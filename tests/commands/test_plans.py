"""A plan for little memory changes no result: small waves, one item at a time, checkpointed, decoded in slices, offloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arcopo_fast import build as assemble
from arcopo_fast.config.reading import load_config
from arcopo_fast.objectives.advantage import group_advantages
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.runtime.memory import resident
from arcopo_fast.training.trainer import Trainer

SMALL = ["rollout.group_size=4", "objective.anchors_per_update=2", "objective.updates=1", "rollout.pivot=2", "lora.rank=4"]
LITTLE_MEMORY = [
    "rollout.branches_per_wave=1",
    "rollout.decode_branches=3",
    "objective.micro_batch=1",
    "objective.checkpoint=true",
    "generator.offload=true",
]


def iteration(directory: Path, *overrides: str) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Latents, scores and gradients of one iteration."""
    config = load_config("toy", [*SMALL, f"run.directory={directory}", *overrides])
    trainer = Trainer(config)
    torch.manual_seed(0)
    for parameter in trainer.parameters:  # B is 0 at first, and hides A's gradients
        torch.nn.init.normal_(parameter, std=0.05)
    gradients: list[Tensor] = []
    trainer.optimizer.step = lambda: gradients.extend(parameter.grad.clone() for parameter in trainer.parameters)  # type: ignore[method-assign]
    rollouts = trainer.rollouts
    prompt = rollouts.prompt(1, 0)
    with rollouts.roll_out(rollouts.encode(prompt), 1, 0) as group:
        scores = rollouts.judge(group, rollouts.decode(group), prompt)
        advantages = group_advantages(scores, config.rewards)
        statistics = trainer.objective.update([(group, advantages)], Stepper(trainer.optimizer))
        assert statistics["update1/ratio_max"] == 0
    return [group.prefix_latents, group.tails], scores, gradients


def test_little_memory_gives_the_same_iteration(tmp_path: Path) -> None:
    latents, scores, gradients = iteration(tmp_path)
    small_latents, small_scores, small_gradients = iteration(tmp_path, *LITTLE_MEMORY)
    for ours, theirs in zip(small_latents, latents, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    for name, values in scores.items():
        torch.testing.assert_close(small_scores[name], values, rtol=0, atol=1e-4)
    assert sum(gradient.abs().max() > 0 for gradient in gradients) == len(gradients) > 0
    scale = max(gradient.abs().max().item() for gradient in gradients)
    for ours, theirs in zip(small_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * scale)


@pytest.mark.parametrize("offload", [True, False])
def test_the_decoder_waits_in_host_memory_from_the_start(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "device_of", lambda name: torch.device("meta"))
    generator = assemble.load_generator(load_config("toy", [f"generator.offload={str(offload).lower()}"]))
    assert generator.model.device.type == "meta" and generator.decoder.vae.device.type == ("cpu" if offload else "meta")


@pytest.mark.parametrize("offload", [True, False])
def test_what_is_resident_when(offload: bool) -> None:
    module, bystander = torch.nn.Linear(2, 3), object()
    with resident(torch.device("meta"), module, bystander, offload=False):
        assert module.weight.device.type == "cpu"
    moved = torch.nn.Linear(2, 3)
    calls: list[str] = []
    moved._apply = lambda fn, recurse=True: (calls.append("moved"), moved)[1]  # type: ignore[method-assign]
    with resident(torch.device("cpu"), moved, bystander, offload=offload):
        assert calls == ["moved"] * offload
    assert calls == ["moved", "moved"] * offload
