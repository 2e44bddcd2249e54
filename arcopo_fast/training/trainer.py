"""The parts of a run: the generator with its adapter, the source of its groups, the objective, the optimizer; and the state that a run
saves."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arcopo_kernels import Choice, Segment
from arcopo_kernels.attention import chosen, slow_on_hopper

from arcopo_fast.build import (
    Generator,
    build_engine,
    build_objective,
    encode_ahead,
    load_generator,
    load_held_out,
    load_prompts,
    load_rewards,
)
from arcopo_fast.config.schema import Config
from arcopo_fast.data.buffer import Buffer
from arcopo_fast.data.prompts import digest
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation.filters import Filter
from arcopo_fast.evaluation.judging import Evaluation, evaluate
from arcopo_fast.evaluation.sharpness import few_steps
from arcopo_fast.model.lora import adapter_parameters, frozen_state, load_adapter, save_adapter
from arcopo_fast.model.sizes import VAESizes
from arcopo_fast.objectives.optimizer import Stepper
from arcopo_fast.objectives.updates import Updates
from arcopo_fast.planning.ceilings import measure_ceilings
from arcopo_fast.planning.lockstep import check_lockstep
from arcopo_fast.planning.needs import fetch
from arcopo_fast.planning.plan import over_plan
from arcopo_fast.planning.spread import idle, spread
from arcopo_fast.planning.work import floors
from arcopo_fast.rewards.base import Reward
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.runtime.distributed import World
from arcopo_fast.storage.identity import checksum, sampled_digest, version_of
from arcopo_fast.storage.run_dir import RunDirectory, step_of
from arcopo_fast.training.buffered import BufferedGroups, policy_of, training_prompts
from arcopo_fast.training.groups import Outcome, Rollouts


def check_trainable(config: Config) -> None:
    """Raise UserError for what can generate videos, but cannot be trained."""
    if config.generator.dtype == "float16":
        raise UserError(
            "generator.dtype=float16 cannot be trained: the gradient of one latent's element is about 4e-8, below what float16 holds; "
            "use generator.dtype=bfloat16, or float32"
        )


class Trainer:
    """Everything that a run trains and trains with.

    Attributes:
        config: the recipe.
        rewards, held_out: by name; the second are never trained on.
        prompts: disjoint sets for training and evaluation.
        generator, engine: its model has the adapter that learns.
        objective, stepper: do the policy updates and their optimizer steps.
        world: all ranks of the job; every rank has a trainer, and they do everything together.
        spread: the way an iteration is spread over them.
        team: the ranks that share every group of this one.
        rollouts: makes groups of the policy as it is.
        groups: gives the groups of an iteration: `rollouts`, or a buffer's.
        input_digests: of everything that all videos depend on, see `check_inputs`.
        judges: fingerprints of rewards and held-out metrics.
    """

    def __init__(self, config: Config, world: World | None = None) -> None:
        check_trainable(config)
        self.config = config
        self.world = world = world or World()
        self.spread = spread(config, world.size)
        if config.generator.shard and not world.alone:
            check_lockstep(config, self.spread)
        self.team = world.team(self.spread.ranks)
        if warning := idle(config, world.size):
            warnings.warn(warning, stacklevel=2)
        for risk in config.objective.risks(config.rollout.group_size, config.video.chunk_frames):
            warnings.warn(risk, stacklevel=2)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        fetch(config, world)
        self.rewards: dict[str, Reward] = load_rewards(config)
        self.prompts = load_prompts(config)
        self.generator: Generator = load_generator(config, adapted=True, world=world)
        ahead = [*training_prompts(config, self.prompts.training), *self.prompts.evaluation]
        encode_ahead(self.generator.encode_text, (part.for_generator for prompt in ahead for _, part in prompt.parts), world)
        self.held_out = load_held_out(self.generator)
        self.engine: Engine = build_engine(config, self.generator.model, vae=self.generator.decoder.vae)
        self.shape = self.engine.shape
        self.objective = build_objective(config, self.engine)
        self.rollouts = Rollouts(config, self.generator, self.engine, self.objective, self.prompts, self.rewards, self.team)
        self.groups: Rollouts | BufferedGroups = self.rollouts
        if config.train.buffer is not None:
            buffer = Buffer.open(config.train.buffer, policy_of(config, self.generator, self.objective))
            self.groups = BufferedGroups(config, self.generator, self.engine, self.objective, buffer)
        self.input_digests = self._input_digests()
        self.judges = {name: judge.fingerprint(name) for name, judge in {**self.rewards, **self.held_out}.items()}
        self.parameters = adapter_parameters(self.generator.model)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay)
        self.stepper = Stepper(
            self.optimizer, eps=optimizer.eps, gradient_clip=optimizer.gradient_clip, relative_clip=optimizer.relative_clip
        )

    def inputs(self) -> dict[str, Any]:
        """Return what a run is made from besides its recipe, by name: the same on all ranks, or they train apart."""
        return {**self.input_digests, "set of judges": self.judges}

    def check_ranks(self) -> None:
        """Check that all ranks have the same to work with.

        Raises:
            UserError: some have not; the message names them.
        """
        same = {
            "recipe": self.config.model_dump_json(),
            "version of torch or arcopo_fast": [version_of(package) for package in ("torch", "arcopo_fast")],
            **self.inputs(),
            "fresh adapter": self.checksum(),
        }
        for what, value in same.items():
            self.world.check_same(what, value)

    def checksum(self) -> int:
        """Return a checksum of the adapter's weights."""
        return checksum(self.parameters)

    def check_adapters(self, iteration: int) -> None:
        """Check that all ranks have the same adapter after an iteration.

        Raises:
            UserError: some have not; the message names them.
        """
        self.world.check_same(
            f"adapter after iteration {iteration}",
            self.checksum(),
            "their gradients were not summed, or one of their devices computes wrongly. Every checkpoint is from before",
        )

    def updates(self, iteration: int) -> Updates:
        """Return the policy updates of an iteration. A buffered group is used again and again, each time with new draws."""
        draw = () if self.groups is self.rollouts else (self.config.seed, iteration)
        return Updates(self.objective, self.stepper, draw=draw, world=self.world, team=self.team)

    @property
    def own_groups(self) -> list[int]:
        """Numbers of this rank's groups of an iteration."""
        rollout = self.config.rollout
        return self.spread.groups(self.world.rank, rollout.prompts_per_iteration, rollout.pivots_per_video)

    def everybodys(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Return the outcomes of an iteration's groups on all ranks, in their order."""
        found = self.world.gathered(list(outcomes) if self.team.is_main else [])
        return sorted((outcome for rank in found for outcome in rank), key=lambda outcome: outcome.number)

    def agree(self) -> None:
        """Let all ranks take the waves and micro-batches of the one that has least memory left."""
        batching, before = self.objective.batching, (self.engine.largest_wave, self.objective.batching.state())
        waves, states = zip(*self.world.gathered(before))
        self.engine.largest_wave = min((wave for wave in waves if wave), default=None)
        sizes = [state["micro_batch"] for state in states if state["micro_batch"]]
        batching.restore({"micro_batch": min(sizes, default=None), "checkpoint": any(state["checkpoint"] for state in states)})
        if (now := (self.engine.largest_wave, batching.state())) != before:
            values = {"rollout.branches_per_wave": now[0]} | {f"objective.{name}": value for name, value in now[1].items()}
            told = " ".join(f"{name}={str(value).lower()}" for name, value in values.items() if value is not None)
            warnings.warn(f"another rank ran out of memory; all continue with {told}: set this in the recipe", stacklevel=2)

    def _input_digests(self) -> dict[str, str]:
        """Return digests of everything that all videos depend on."""
        generator = self.generator
        return {
            "transformer": sampled_digest(frozen_state(generator.model).items()),
            "VAE": sampled_digest(generator.decoder.vae.state_dict().items()),
            "text encoder": generator.encode_text.fingerprint,
            "set of prompts": digest([*self.prompts.training, *self.prompts.evaluation]),
        }

    def evaluate(self, filters: Mapping[str, Filter] | None = None) -> Evaluation:
        """Make and judge the evaluation videos under the policy that the objective evaluates, also after `filters`."""
        parts = self.config, self.generator, self.engine, self.prompts.evaluation, self.rewards
        with self.objective.policies.as_(self.objective.evaluated):
            found = evaluate(*parts, self.held_out, self.world, filters)
            if self.config.evaluation.few_steps:
                found.few_steps = few_steps(*parts, self.world)
        return found

    def set_learning_rate(self, iteration: int) -> float:
        """Set and return the learning rate of an iteration, a function of its number alone."""
        progress = (iteration - 1) / self.config.train.iterations
        factors = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        factor = factors[self.config.optimizer.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.optimizer.lr
        return group["lr"]

    def device(self) -> dict[str, Any]:
        """Return what device.json says: the device, what it reaches at best, and by pivot the seconds below which no stage gets."""
        config, model = self.config, self.generator.model
        ceilings = measure_ceilings(model.device, model.dtype)
        name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{platform.machine()} CPU"
        floor = floors(config, model.config, VAESizes.from_config(self.generator.decoder.vae.config), ceilings)
        versions = {package: version_of(package) for package in ("torch", "arcopo_fast")}
        kernels = {"attention": self.attention()._asdict()}
        return {"device": name, "versions": versions, "dtype": config.generator.dtype, **kernels, **ceilings._asdict(), "floor": floor}

    def attention(self) -> Choice:
        """Return what the chunks' attention over a cached chunk runs on, and why."""
        video, model = self.config.video, self.generator.model
        tokens = video.chunk_frames * model.config.tokens_per_frame(video.latent_height, video.latent_width)
        size = (1, tokens, model.config.num_attention_heads, model.config.attention_head_dim)
        query = torch.empty(size, dtype=model.dtype, device=model.device)
        return chosen(query, [Segment(query, query, frozen=True)])

    def slow_attention(self) -> str | None:
        """Return what to say if the generator's GPU has a faster attention than this run gets."""
        device = self.generator.model.device
        return slow_on_hopper(self.attention(), torch.cuda.get_device_capability(device)) if device.type == "cuda" else None

    def over_plan(self) -> str | None:
        """Return what to say if the run has taken more of the device's memory than was planned."""
        device = self.generator.model.device
        if device.type != "cuda":
            return None
        return over_plan(self.config, torch.cuda.max_memory_allocated(device), self.world.size)

    def save(self, run: RunDirectory, iteration: int) -> None:
        """Write checkpoints/step-N: the adapter and the optimizer's state; complete or absent. Everything else follows from N.

        What became smaller than the recipe says when memory ran out is kept, too: with other shapes a run that goes on would round
        differently.
        """
        halved = self.objective.batching.changed()
        if self.engine.largest_wave is not None:
            halved["largest_wave"] = self.engine.largest_wave
        with run.checkpoint(iteration) as directory:
            save_adapter(directory / "adapter", self.generator.model, base_model=self.config.generator.checkpoint)
            state = {"iteration": iteration, "optimizer": self.optimizer.state_dict(), "halved": halved}
            torch.save(state | {"objective": self.objective.state_dict()}, directory / "trainer.pt")

    def restore(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        load_adapter(self.generator.model, directory / "adapter")
        state = torch.load(directory / "trainer.pt", map_location="cpu", weights_only=True)  # where AdamW counts its steps; the rest moves
        if state["iteration"] != step_of(directory):
            raise UserError(f"{directory} is the checkpoint of iteration {state['iteration']}; rename it accordingly")
        self.optimizer.load_state_dict(state["optimizer"])
        halved = state.get("halved", {})
        self.engine.largest_wave = halved.get("largest_wave")
        self.objective.batching.restore(halved)
        self.objective.load_state_dict(state.get("objective", {}))
