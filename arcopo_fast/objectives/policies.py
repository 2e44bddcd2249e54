"""Named policies of one generator: adapters on one base, of which one is live at a time.

* ``live``: the adapter that learns.
* ``reference``: the base without an adapter.
* ``rollout``: the live adapter as it was when the iteration's groups were made.
* any other name, such as ``old``: a copy of the live adapter as it once was, or a moving average of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arcopo_fast.model.lora import adapter_disabled, adapter_state, load_adapter_state


class Policies:
    """The policies of a generator.

    Args:
        model: has an adapter, unless only ``live`` and ``reference`` are asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in ("live", "reference") or name in self._kept

    @contextmanager
    def as_(self, name: str) -> Iterator[None]:
        """Compute with the policy `name` within the block.

        The weights are copied into place and back, so that captured graphs stay valid: no backward pass may reach from inside to outside.
        """
        if name == "reference":
            with adapter_disabled(self.model):
                yield
        elif name == "live":
            yield
        else:
            live = _copy(adapter_state(self.model))
            try:
                load_adapter_state(self.model, self._kept[name])  # in here: an interrupt must not leave half of it as the live weights
                yield
            finally:
                load_adapter_state(self.model, live)

    def keep(self, name: str) -> None:
        """Make the policy `name` a copy of the live one."""
        self._kept[name] = _copy(adapter_state(self.model))

    def drop(self, name: str) -> None:
        """Forget the policy `name`."""
        self._kept.pop(name, None)

    def decay(self, name: str, rate: float) -> None:
        """Move the policy `name` towards the live one: rate * itself + (1 - rate) * live."""
        for tensor, live in zip(self._kept[name].values(), adapter_state(self.model).values()):
            tensor.lerp_(live, 1 - rate)

    def is_live(self, name: str) -> bool:
        """Return whether the policy `name` has the live one's weights; for the reference, whether the live adapter adds exactly nothing."""
        live = adapter_state(self.model)
        if name == "reference":
            return not any(tensor.any() for key, tensor in live.items() if ".lora_B." in key)
        return name == "live" or all(torch.equal(live[key], tensor) for key, tensor in self._kept[name].items())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the copies by name, each as `adapter_state` returns it."""
        return dict(self._kept)

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `state_dict` returned."""
        live = adapter_state(self.model)
        self._kept = {name: {key: tensor.to(live[key], copy=True) for key, tensor in copies.items()} for name, copies in state.items()}


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
