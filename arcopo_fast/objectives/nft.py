"""Astrolabe: pull every chunk's prediction towards videos that scored well and away from those that scored badly (arXiv 2603.17051).

It needs no trajectory and no ratio: a finished chunk x_0 is noised anew to x_t, as in DiffusionNFT (arXiv 2509.16117). With p the live
policy's prediction of x_0, p_old the old one's, and the advantage A of the video, clamped to A_max,

    r = (1 + A / A_max) / 2
    L = r |p_old + beta (p - p_old) - x_0|^2 + (1 - r) |p_old - beta (p - p_old) - x_0|^2, a mean over elements, chunks and members

(`arcopo_kernels.nft`). Members share the prefix and differ in all noise after it: independent videos are `rollout.pivot: 1`. Each chunk is
trained in its member's own context, which the rollout made and which is constant, one chunk after the other. The old policy makes the
groups. This is the paper's method; its released code is another one, see docs/astrolabe.md, which also says how it can blur a few-step
generator.

A distance to a reference policy, a mean square in x_0 space, may be added: for all videos ("uniform"), or only for those that the primary
reward ranks far above the other rewards ("selective", see `selective`). The ranks, and the number of videos that the mean is over, are of
all groups of an iteration on all ranks, as in the paper. They are known only after the last group, and a group gives its gradient before
the next one is rolled out. Ranks inside a group would be others: there rho of the members that are ahead is one of 24, whether that group
fools a reward or not. Ranks among the scores of earlier iterations would be those of other policies and prompts. So with "selective" the
first update waits: groups wait as latents in host memory, and their contexts are made again, by one clean pass for each chunk of the one
shared prefix. Memory is that of one group, as without; with one group, or independent videos, the waiting costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from arcopo_fast.config.sections import Decay, ObjectiveSettings, Positive, PositiveFloat
from arcopo_fast.objectives.base import Loss, Objective
from arcopo_fast.objectives.selective import Renewal, Selection, disagreement
from arcopo_fast.rollout.noise import NoisePlan, keyed_rng, normal
from arcopo_fast.rollout.sampler import Steps
from arcopo_fast.storage.metrics import Chart

if TYPE_CHECKING:
    from arcopo_fast.rollout.engine import Engine
    from arcopo_fast.rollout.group import Group, Samples
    from arcopo_fast.rollout.stream import Stream

REFERENCE = "kl_reference"
"""Name of the copy that the policy is held to."""
AVERAGE = "average"
"""Name of the moving average that is evaluated."""


class NFTSettings(ObjectiveSettings):
    """Settings of Astrolabe: the loss, its timesteps, the old policy, and the reference that holds the policy back."""

    kind: str = "nft"
    updates: Positive = Field(1, description="optimizer steps of an iteration")
    beta: PositiveFloat = Field(
        1.0, description="of p_old +- beta (p - p_old); the smaller, the further the optimum lies from the old policy"
    )
    advantage_max: PositiveFloat = Field(5.0, description="A_max: advantages of -A_max and less are r = 0, of A_max and more r = 1")
    timesteps: Literal["warped", "raw", "uniform"] = Field(
        "warped",
        description="timesteps that are trained, one drawn for each chunk of a member; warped: the sampler's own; raw: its list without "
        "the warp, as in the released code; uniform: any in (0, 1000]",
    )
    explored_chunks: Positive | None = Field(
        None, description="chunks from the pivot on in which members have noise of their own, and which are trained; null: all"
    )
    old: Literal["ema", "ramp", "sync"] = Field(
        "ema",
        description="the old policy after an iteration, d old + (1 - d) live; ema: d = old_decay; ramp: d = min(old_ramp * iterations, "
        "old_decay_max); sync: d = 0",
    )
    old_decay: Decay = Field(0.9, description="d of the old policy, for old=ema")
    old_ramp: float = Field(0.001, ge=0, description="growth of d with each iteration, for old=ramp")
    old_decay_max: Decay = Field(0.5, description="largest d, for old=ramp")
    kl: Literal["none", "uniform", "selective"] = Field(
        "none",
        description="videos whose predictions are held to the reference; selective: those that kl_primary ranks far above other rewards",
    )
    kl_weight: float = Field(1e-4, ge=0, description="weight of the mean squared distance to the reference")
    kl_primary: str | None = Field(None, description="the reward that might be fooled, for kl=selective; null: the first of the recipe")
    kl_reference: Literal["reset", "base"] = Field(
        "reset", description="the reference; reset: the base, then a copy of the policy each time that kl_tau or kl_max_age is passed; base"
    )
    kl_tau: PositiveFloat = Field(0.15, description="distance beyond which the reference is reset, at first; it follows how often that is")
    kl_max_age: Positive = Field(15, description="iterations after which the reference is reset in any case")
    evaluation_ema: Decay | None = Field(
        None, description="decay of an average of the policy, which is evaluated and left behind in its place; null: none"
    )

    def check_rewards(self, weights: Mapping[str, float]) -> None:
        """Raise ValueError if the recipe's rewards do not do for `kl`."""
        names = [name for name, weight in weights.items() if weight]
        if self.kl == "selective" and len(names) < 2:
            raise ValueError(
                f"objective.kl selective compares rewards, and only {', '.join(names)} has a weight: give another one, or set "
                "objective.kl=uniform"
            )
        if self.kl_primary is not None and self.kl_primary not in names:
            raise ValueError(f"objective.kl_primary {self.kl_primary!r} is not among the rewards that have a weight: {', '.join(names)}")

    def risks(self, group_size: int, chunk_frames: int) -> list[str]:
        """Return settings that are known to blur a few-step generator, each in a sentence with figures; docs/astrolabe.md has them all."""
        found = []
        measured = "measured on an earlier toy world, 40 iterations from a reward of 2.269"
        if self.timesteps != "warped":
            found.append(
                f"objective.timesteps={self.timesteps} trains noise levels that the sampler never visits: with uniform timesteps and "
                f"DiffusionNFT's loss the reward fell to 2.19 and log acutance by 0.031 ({measured}); take timesteps=warped"
            )
        largest = (group_size - 1) ** 0.5
        if self.reward_combine == "sum" and largest > self.advantage_max:
            found.append(
                f"objective.advantage_max={self.advantage_max:g} may cut advantages of a group of {group_size}, which reach {largest:.2g}, "
                "and so move their mean from 0: rewards off center by half a standard deviation took the reward to 1.59 and log acutance "
                f"down by 0.16 ({measured}); take a smaller rollout.group_size or a larger advantage_max"
            )
        if self.advantage_baseline == "anchor":
            found.append(
                "objective.advantage_baseline=anchor moves the mean of a group's advantages from 0, and then the loss pulls towards "
                "blurred means or away from them: rewards off center by half a standard deviation took the reward to 1.59 and log acutance "
                f"down by 0.16 ({measured}); take advantage_baseline=mean"
            )
        if chunk_frames > 3:
            found.append(
                f"video.chunk_frames={chunk_frames}: such losses are said to keep few-step generators sharp for chunks of up to 3 latent "
                "frames; nobody has shown it for longer ones"
            )
        return found


class Target(NamedTuple):
    """The data that Astrolabe compares a group's samples with.

    Attributes:
        r: rewards in [0, 1], [G].
        chunks: finished chunks x_0 by number, [G, F, C, h, w] each.
        held: weight [G] of each member's distance to the reference, with a mean of 1 over all videos of the iteration; None: no distance.
    """

    r: Tensor
    chunks: dict[int, Tensor]
    held: Tensor | None


class NFTObjective(Objective[NFTSettings]):
    """Astrolabe: the forward-process loss, its old policy and its reference."""

    Settings = NFTSettings
    method = "Astrolabe (arXiv 2603.17051)"

    def __init__(self, engine: Engine, settings: NFTSettings, *, reference: bool = False) -> None:
        super().__init__(engine, settings, reference=reference)
        self.moves = 0  # iterations after which the old policy was moved
        self.selection, self.renewal = Selection(), Renewal(settings.kl_tau)
        self._delta = torch.zeros(0, dtype=torch.float64)  # of the iteration's videos
        self._held: dict[tuple[int | str, ...], Tensor] = {}  # by `Group.key`, see `Target`

    # Noises and samples

    def noise_plan(self, strength: float) -> NoisePlan:
        """Return a plan in which members share nothing from the pivot on, and nothing but the finished chunks is kept."""
        return NoisePlan(1.0, self.engine.rule, self.explored_chunks(self.settings), keep="clean")

    @classmethod
    def explored_chunks(cls, settings: Any) -> int | None:
        return settings.explored_chunks

    def samples(self, group: Group, update: int, draw: tuple[int | str, ...] = ()) -> list[Samples]:
        """Return each member's chunks from the pivot on, in order, each noised anew to a timestep that is drawn for it."""
        from arcopo_fast.rollout.group import Samples  # loads the network, which reading a recipe does not need

        found = []
        for chunk, clean in list(group.own_chunks(self.engine.shape.chunk_frames).items())[: self.settings.explored_chunks]:
            name = (*group.key, *draw, "forward", update, chunk)
            noise = torch.cat([normal((1, *clean.shape[1:]), *name, "noise", member) for member in range(group.size)])
            steps, step = self._timesteps(chunk, [keyed_rng(*name, "timestep", member).random() for member in range(group.size)])
            found.append(Samples.noised(chunk, clean, noise.to(clean.device), steps, step))
        return found

    def _timesteps(self, chunk: int, uniform: list[float]) -> tuple[Steps, Tensor]:
        """Return timesteps of a chunk and which of them each member is trained at, [G], given numbers in [0, 1)."""
        engine, settings = self.engine, self.settings
        if settings.timesteps == "uniform":
            timesteps = [1000 * (1 - number) for number in uniform]
            return Steps(tuple(timesteps), tuple(map(engine.schedule.sigma, timesteps))), torch.arange(len(uniform))
        steps = engine.steps_of(chunk)
        if settings.timesteps == "raw":
            listed = (engine.sampler.first_chunk_steps if chunk == 0 else None) or engine.sampler.steps
            steps = Steps.from_schedule(engine.schedule, listed, warp=False)
        return steps, torch.tensor([int(number * len(steps)) for number in uniform])

    # Policies

    @property
    def acting(self) -> str:
        """Name of the old policy, once there is one; before the first iteration it is the live policy."""
        return "old" if "old" in self.policies else "live"

    @property
    def maker(self) -> str:
        return "reference" if self.reference else "old"

    @property
    def evaluated(self) -> str:
        return AVERAGE if AVERAGE in self.policies else "live"

    @property
    def held_to(self) -> str:
        """Name of the policy that the live one is held to."""
        return "reference" if self.settings.kl_reference == "base" else REFERENCE

    @property
    def waits(self) -> bool:
        return self.settings.kl == "selective" and self.settings.kl_weight > 0

    def compared(self) -> tuple[str, ...]:
        """Return the policy that made the groups, and the reference if any video of the iteration is held to it."""
        uniform = self.settings.kl == "uniform" and self.settings.kl_weight > 0
        held = uniform or any(weights.any() for weights in self._held.values())
        return tuple(dict.fromkeys([self.maker, *([self.held_to] if held else [])]))

    def begin(self) -> None:
        """Make what is not there yet a copy of the live policy, which is the base before the first iteration."""
        settings, self._held = self.settings, {}
        wanted = {
            "old": not self.reference,
            REFERENCE: settings.kl != "none" and settings.kl_weight > 0 and settings.kl_reference == "reset",
            AVERAGE: settings.evaluation_ema is not None,
        }
        for name in (name for name, needed in wanted.items() if needed and name not in self.policies):
            self.policies.keep(name)

    def compare(self, rewards: Mapping[tuple[int | str, ...], Mapping[str, Tensor]]) -> None:
        """Choose the videos that are held to the reference, among those of all groups on all ranks."""
        names = list(next(iter(rewards.values()), {}))
        if not names:
            return
        scores = {name: torch.cat([group[name] for group in rewards.values()]) for name in names}
        self._delta = disagreement(scores, self.settings.kl_primary or names[0])
        mask = self.selection.mask(self._delta)
        weights = mask.double() * (len(mask) / max(1, int(mask.sum())))
        self._held = dict(zip(rewards, weights.split([len(group[names[0]]) for group in rewards.values()])))

    def end(self, statistics: Mapping[str, float]) -> Mapping[str, float]:
        """Move the old policy and the average, adapt which videos are held, and renew the reference where it is due."""
        settings, moved = self.settings, {}
        if not self.reference:
            moved["old_decay"] = old_decay(settings, self.moves)
            self.policies.decay("old", moved["old_decay"])
        if settings.evaluation_ema is not None:
            self.policies.decay(AVERAGE, min((1 + self.moves) / (10 + self.moves), settings.evaluation_ema))
        self.moves += 1
        if self.waits:
            moved["held_share"] = self.selection.rho
            self.selection.follow(self._delta)
        if REFERENCE in self.policies:
            due = self.renewal.due(statistics.get(f"update{settings.updates}/kl", 0.0), settings.kl_max_age)
            moved |= {"reference_age": self.renewal.age, "reference_reset": float(due)}
            if due:
                self.policies.keep(REFERENCE)
        return moved

    # The loss

    def target(self, group: Group, advantages: Tensor) -> Target:
        """Return r, the finished chunks, and how much each member is held to the reference."""
        largest = self.settings.advantage_max
        r = (0.5 + advantages.clamp(-largest, largest) / (2 * largest)).clamp(0, 1)
        held = self._held.get(group.key)
        if self.settings.kl == "uniform" and self.settings.kl_weight > 0:
            held = torch.ones(group.size)
        return Target(r.to(group.tails), group.own_chunks(self.engine.shape.chunk_frames), None if held is None else held.to(group.tails))

    def predict_known(self, policy: str, group: Group, samples: Samples, context: Stream) -> Tensor:
        """Return x0hat under a policy; for the reference nothing is predicted where no sample is held to it: the loss does not look."""
        held = self._held.get(group.key)
        unneeded = policy == self.held_to != self.maker and held is not None and not held[samples.members.to(held.device)].any()
        if unneeded and self.engine.model.ranks == 1:  # ranks that share the weights make the same passes
            return samples.x
        return super().predict_known(policy, group, samples, context)

    def loss(self, group: Group, target: Target, samples: Samples, new: Tensor, compared: Mapping[str, Tensor]) -> Loss:
        from arcopo_kernels.nft import nft_loss  # here: reading a recipe imports this file, and needs no kernel

        members = samples.members.to(target.r.device)
        clean = target.chunks[samples.chunk][members]
        out = nft_loss(new, compared[self.maker], clean, target.r[members], beta=self.settings.beta)
        loss, statistics = out.loss, {"l_plus": out.l_plus, "l_minus": out.l_minus, "drift": out.drift}
        if target.held is not None:
            weights, distance = target.held[members], torch.zeros_like(loss)
            if weights.any():
                distance = weights * (new - compared[self.held_to]).square().flatten(1).mean(1)
            loss = loss + self.settings.kl_weight * distance
            statistics |= {"kl": distance.detach(), "held": (weights > 0).to(loss.dtype)}
        return Loss(loss, statistics)

    # What is shown, planned and kept

    def headline(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return how far the live policy is from the old one in the last update, a root mean square."""
        return {"drift": record.get(f"update{self.settings.updates}/drift", 0.0) ** 0.5}

    @classmethod
    def charts(cls, settings: Any) -> tuple[Chart, ...]:
        drift = "Mean square of p − p_old: how far the policy that learns is from the one that makes the videos."
        charts = [
            Chart("Distance from the old policy", drift, "drift", each_update=True),
            Chart("Error towards good videos", "Mean square of p_old + β (p − p_old) − x₀.", "l_plus", each_update=True),
            Chart("Error away from bad videos", "Mean square of p_old − β (p − p_old) − x₀.", "l_minus", each_update=True),
        ]
        if settings.kl != "none":
            charts += [
                Chart(
                    "Distance from the reference", "Mean square of p − p_ref over the videos that are held to it.", "kl", each_update=True
                ),
                Chart("Age of the reference", "Iterations since it was last the policy itself.", "reference_age", if_any=True),
            ]
        if settings.kl == "selective":
            charts.append(Chart("Videos held to the reference", "Share of all videos.", "held", each_update=True))
        return tuple(charts)

    @classmethod
    def samples_per_update(cls, settings: Any, steps: int, group_size: int) -> int:
        return group_size

    @classmethod
    def states_per_chunk(cls, settings: Any, steps: int) -> int:
        return 0

    @classmethod
    def kept_policies(cls, settings: Any) -> int:
        held = settings.kl != "none" and settings.kl_weight > 0 and settings.kl_reference == "reset"
        return 1 + held + (settings.evaluation_ema is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return the policies, the number of their moves, and the controllers."""
        return {**super().state_dict(), "moves": self.moves, "selection": asdict(self.selection), "renewal": asdict(self.renewal)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.moves, self.selection, self.renewal = state["moves"], Selection(**state["selection"]), Renewal(**state["renewal"])


def old_decay(settings: NFTSettings, moves: int) -> float:
    """Return d in old <- d old + (1 - d) live, after so many earlier moves."""
    ramp = min(settings.old_ramp * moves, settings.old_decay_max)
    return {"ema": settings.old_decay, "ramp": ramp, "sync": 0.0}[settings.old]


OBJECTIVE = NFTObjective
