"""Adapters to evaluate: how they are named and given, and that one leaves nothing behind for the next."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from support.evaluations import SMALL, write_adapters

from arcopo_fast import evaluate
from arcopo_fast.build import load_generator
from arcopo_fast.config.reading import load_config
from arcopo_fast.evaluation.adapters import AdapterOption, adapted_generators, name_of, prepare_adapters
from arcopo_fast.evaluation.scores import BASE
from arcopo_fast.model.lora import adapter_state, set_adapter


def test_an_adapter_and_its_scales() -> None:
    options = {
        "runs/on": (None, "runs/on", (1.0,)),
        "runs/on@0.5,1": (None, "runs/on", (0.5, 1.0)),
        "a=runs/x=y@-1e-1": ("a", "runs/x=y", (-0.1,)),
        "hf://owner/name@main/file.safetensors@2": (None, "hf://owner/name@main/file.safetensors", (2.0,)),
        "hf://owner/name@main": (None, "hf://owner/name@main", (1.0,)),
    }
    assert {text: tuple(evaluate.adapter_option(text)) for text in options} == options
    names = {
        "runs/on/adapter/adapter_model.safetensors": "on",
        "x/my lora.safetensors": "my-lora",
        "y/pytorch_lora_weights.safetensors": "y",
    }
    assert {path: name_of(Path(path)) for path in names} == names


def test_adapters_in_turn_leave_nothing_behind(tmp_path: Path) -> None:
    """What the model holds is the same whatever it held before, and in the layers and ranks that an adapter lacks it is zero."""
    adapters = write_adapters(tmp_path)
    model = load_generator(load_config("toy", SMALL[1:])).model
    options = [AdapterOption(None, str(adapters[name]), (0.5,)) for name in ("on", "semi", "zero")]
    generators = adapted_generators(options, base=True)
    prepare_adapters(model, [one.source for one in generators if one.source])
    states: dict[str, list[dict[str, torch.Tensor]]] = {}
    for one in [*generators, *random.sample(generators, 4), *generators]:
        set_adapter(model, one.adapter, one.scale)
        states.setdefault(one.name, []).append({name: tensor.clone() for name, tensor in adapter_state(model).items()})
    for name, found in states.items():
        assert all(torch.equal(state[key], found[0][key]) for state in found for key in state), name
    semi = next(one.source for one in generators if one.name == "semi@0.5")
    assert semi is not None
    for module in {key.rpartition(".lora_")[0] for key in states[BASE][0]}:
        down, up = (states["semi@0.5"][0][f"{module}.lora_{letter}.weight"].double() for letter in "AB")
        keys = [f"{module}.lora_{letter}.weight" for letter in "AB"]
        expected = torch.zeros_like(up @ down)
        if keys[0] in semi.adapter.state:
            expected = 0.5 * 10 / 5 * semi.adapter.state[keys[1]].double() @ semi.adapter.state[keys[0]].double()
        torch.testing.assert_close(up @ down, expected, rtol=1e-5, atol=1e-8)
        assert not states[BASE][0][keys[1]].any()
