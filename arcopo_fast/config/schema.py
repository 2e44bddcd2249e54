"""Everything that a run can be told: a typed, strict tree of the sections in `sections`, and what must agree between them.

`reading` reads it from a recipe. An objective extends `ObjectiveSettings` in its own file, and a recipe chooses it by `objective.kind`.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import Field, create_model, field_validator, model_validator

from arcopo_fast.config.sections import (
    CacheConfig,
    EvaluationConfig,
    GeneratorConfig,
    JudgeConfig,
    LoraConfig,
    ObjectiveSettings,
    OptimizerConfig,
    Place,
    RewardServersConfig,
    RolloutConfig,
    RunConfig,
    SamplerConfig,
    Section,
    SwitchesConfig,
    TrainConfig,
    VideoConfig,
)
from arcopo_fast.errors import UserError

DEFAULT_OBJECTIVE = "copo"


class Config(Section):
    """Everything that a run can be told."""

    name: str = Field(description="name of the run and its directory")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of every random draw")
    prompts: Place = Field(
        "toy",
        description='"toy": captions of the toy world; "bench": plain sentences; else a file with a prompt on each line, a .jsonl, '
        ".json, .csv or .tsv file with prompt in it, or hf://owner/name/FILE",
    )
    extended_prompts: Place | None = Field(
        None,
        description="text file with a longer form of each line of `prompts`: the generator reads it, rewards read `prompts`; null: none",
    )
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    video: VideoConfig
    sampler: SamplerConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    switches: SwitchesConfig = Field(default_factory=SwitchesConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)  # of the objective that `kind` names: see `config_class`
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    rewards: dict[str, float] = Field(
        description="weight of each reward, by name; at least one is not 0; a custom reward is named package.module:function"
    )
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    reward_servers: RewardServersConfig = Field(default_factory=RewardServersConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    def scores_of(self, window: str) -> dict[str, str]:
        """Return the rewards that judge a window, by the names of their scores: "local/hpsv3", or without `judge.windows` "hpsv3"."""
        rewards = self.judge.seen[window].rewards or self.rewards
        return {f"{window}/{reward}" if window else reward: reward for reward in rewards}

    @property
    def windows(self) -> list[tuple[float, dict[str, float]]]:
        """The weight of each window that is judged, and the rewards' weights in it by the names of their scores."""
        return [
            (window.weight, {score: self.rewards[reward] for score, reward in self.scores_of(name).items()})
            for name, window in self.judge.seen.items()
        ]

    @property
    def score_weights(self) -> dict[str, float]:
        """The weight of each score of a group in its weighted total: that of the reward times that of the window."""
        return {score: window * weight for window, weights in self.windows for score, weight in weights.items()}

    @property
    def anchored(self) -> bool:
        """Whether every group has an anchor: one more branch, which is judged and is no member."""
        return self.objective.advantage_baseline == "anchor"

    @field_validator("name")
    @classmethod
    def _names_a_directory(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
            raise ValueError(f"a run's name is made of letters, digits, '_', '-' and '.', at most 200; given {name[:80]!r}")
        return name

    @field_validator("rewards")
    @classmethod
    def _something_to_learn(cls, rewards: dict[str, float]) -> dict[str, float]:
        if not any(rewards.values()):
            raise ValueError("needs at least one reward with a weight other than 0")
        return rewards

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        cache, video, rollout, objective = self.cache, self.video, self.rollout, self.objective
        if cache.window is not None and cache.window < cache.sink + video.chunk_frames:
            raise ValueError(
                f"cache.window {cache.window} is too small: the sink of {cache.sink} and a chunk of {video.chunk_frames} latent frames "
                f"need {cache.sink + video.chunk_frames}"
            )
        first = 1 if video.independent_first_frame else video.chunk_frames
        if cache.variant.startswith("longlive") and cache.sink > first:
            raise ValueError(
                f"cache.sink {cache.sink} is more than the first chunk's {first} latent frames: official LongLive then attends to frames "
                "that were never written, which is not reproduced; give a sink of at most the first chunk"
            )
        if cache.variant == "krea" and cache.window is not None and cache.window <= video.chunk_frames:
            raise ValueError(
                f"krea recomputes its context for every chunk: cache.window {cache.window} must be more than the chunk's "
                f"{video.chunk_frames} latent frames"
            )
        if (self.train.mode == "on_policy") != (self.train.buffer is None):
            raise ValueError(
                f"train.mode {self.train.mode} and train.buffer {self.train.buffer or 'null'} do not go together: on_policy makes its "
                "groups itself, the other modes read them from a buffer (python -m arcopo_fast.collect)"
            )
        if strangers := [name for name in self.reward_servers.addresses if name not in self.rewards]:
            raise ValueError(f"reward_servers.addresses has {strangers[0]!r}, which is not among the rewards {', '.join(self.rewards)}")
        objective.check_group(rollout.group_size)
        self._check_pivots()
        self._check_windows()
        objective.check_rewards(self.score_weights)
        return self

    def _check_pivots(self) -> None:
        """Raise ValueError for pivots and prompts that do not fit the video."""
        rollout, chunks, every = self.rollout, self.video.count, self.switches.every
        if rollout.horizon is not None and rollout.horizon >= chunks:
            raise ValueError(
                f"rollout.horizon {rollout.horizon} leaves no pivot in a video of L = {chunks} chunks; give at most {chunks - 1}"
            )
        pivots = rollout.pivots(chunks)
        if isinstance(rollout.pivot, int) and not 1 <= rollout.pivot <= pivots:
            reason = "" if rollout.horizon is None else f" with a horizon of {rollout.horizon}"
            raise ValueError(f"rollout.pivot {rollout.pivot} is beyond the video of L = {chunks} chunks{reason}; give 1 to {pivots}")
        if rollout.pivots_per_video > (1 if isinstance(rollout.pivot, int) else pivots):
            advice = "set rollout.pivot=shared" if isinstance(rollout.pivot, int) else f"give at most {pivots}"
            raise ValueError(
                f"rollout.pivots_per_video {rollout.pivots_per_video} asks for as many chunks to fork at, and rollout.pivot "
                f"{rollout.pivot} leaves {1 if isinstance(rollout.pivot, int) else pivots}; {advice}"
            )
        if every is not None and every < self.video.chunk_frames:
            raise ValueError(
                f"switches.every {every} changes the prompt within a chunk of {self.video.chunk_frames} latent frames; give at least "
                f"{self.video.chunk_frames}"
            )

    def _check_windows(self) -> None:
        """Raise ValueError for windows that some branch does not reach, or that do not go together with the rewards."""
        rollout, chunks = self.rollout, self.video.count
        pivots = [rollout.pivot - 1] if isinstance(rollout.pivot, int) else range(rollout.pivots(chunks))
        after = [chunks - 1 - pivot if rollout.horizon is None else rollout.horizon for pivot in pivots]  # the pivot's chunk
        shortest, longest = min(after), max(after)
        for name, window in self.judge.windows.items():
            if unknown := [reward for reward in window.rewards or [] if reward not in self.rewards]:
                raise ValueError(
                    f"judge.windows.{name}.rewards has {unknown[0]!r}, which is not among the rewards {', '.join(self.rewards)}; give it a "
                    "weight in rewards"
                )
            first, last = window.chunks
            if first > shortest or (last or 0) > longest:
                raise ValueError(
                    f"judge.windows.{name}.chunks {list(window.chunks)} lies outside of the branches: with rollout.pivot {rollout.pivot}, "
                    f"rollout.horizon {'null' if rollout.horizon is None else rollout.horizon} and L = {chunks} chunks, {shortest} to "
                    f"{longest} follow the pivot's; give a first chunk of at most {shortest} and a last one of at most {longest}, or "
                    "another horizon"
                )
        judged = {reward for name in self.judge.seen for reward in self.scores_of(name).values()}
        if idle := [reward for reward in self.rewards if reward not in judged]:
            raise ValueError(f"the reward {idle[0]!r} judges no window; add it to the rewards of one of judge.windows, or remove it")
        if not any(self.score_weights.values()):
            raise ValueError("no score has a weight other than 0: the windows that have a weight are judged by rewards that have none")


# Objectives ------------------------------------------------------------------------------------------------------------------------


def objective_class(kind: str) -> Any:
    """Return the objective that a recipe's `objective.kind` names: its module's `OBJECTIVE`, which has a class `Settings`.

    The module is one of `arcopo_fast.objectives`, or any that can be imported, by its dotted name. It is imported here and not at the top:
    settings are read without the engine where nothing is trained.

    Raises:
        UserError: there is no such module, or it holds no objective.
    """
    path = kind if "." in kind else f"arcopo_fast.objectives.{kind}"
    problem = "not the name of a module"
    if all(part.isidentifier() for part in path.split(".")):
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise  # the module is there; it is one of its own imports that is not
            problem = str(error)
        else:
            if hasattr(module, "OBJECTIVE"):
                return module.OBJECTIVE
            problem = f"{path} has no OBJECTIVE"
    known = f"{', '.join(objectives())} or the dotted name of a module with OBJECTIVE"
    raise UserError(f"objective.kind: no objective {kind[:80]!r} ({problem}); give {known}")


def objectives() -> list[str]:
    """Return the names of the objectives in the package: its modules that define OBJECTIVE. None is imported."""
    modules = [entry for entry in (files("arcopo_fast") / "objectives").iterdir() if entry.name.endswith(".py")]
    return sorted(entry.name.removesuffix(".py") for entry in modules if "\nOBJECTIVE = " in entry.read_text(encoding="utf-8"))


@cache
def config_class(kind: str) -> type[Config]:
    """Return `Config` with the settings of one objective."""
    settings = objective_class(kind).Settings
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, objective=(settings, Field(default_factory=settings)))
