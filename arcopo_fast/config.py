"""What a run can be told: a typed, strict tree, read from one YAML recipe and `key.sub=value` overrides.

A recipe is self-contained: nothing is inherited from another file. An unknown key, a wrong type or a contradiction is a `UserError` of one
line that says where the value came from, what was expected and, for a misspelt key, which name is nearest.

YAML is read by the 1.2 core rules: `1e-5` is a number, and only `true` and `false` are booleans. Python's usual reader follows 1.1, where
`1e-5` is a string and `no` is false.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
import types
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Iterator, Literal, Mapping, Sequence, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from arcopo_fast.errors import UserError
from arcopo_fast.settings import ObjectiveSettings, Positive, PositiveFloat, Section

DEFAULT_RECIPE = "toy"
DEFAULT_OBJECTIVE = "copo"

Decay = Annotated[float, Field(ge=0, lt=1)]


def _timesteps(steps: list[float]) -> list[float]:
    if not steps:
        raise ValueError("needs at least one timestep")
    if any(not 0 < step <= 1000 for step in steps):
        raise ValueError(f"timesteps lie in (0, 1000]; given {steps}")
    if any(later >= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"timesteps must decrease; given {steps}")
    return steps


Timesteps = Annotated[list[float], AfterValidator(_timesteps)]


class GeneratorConfig(Section):
    """The generator that is aligned."""

    checkpoint: str = Field(
        "toy", min_length=1, description='"toy": the checkpoint shipped with the package; random:1.3b, random:14b: untrained; else a path'
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen base; the adapter is always float32")
    vae_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the decoder; bfloat16 is fast on a GPU")
    offload: bool = Field(False, description="decoder and rewards wait in host memory, each until its turn: less memory, more time")
    device: str = Field("auto", description='"auto": the GPU if there is one; else cpu, cuda or cuda:N')

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"a device is auto, cpu, cuda or cuda:N; given {device!r}")
        return device


class VideoConfig(Section):
    """The shape of a video."""

    chunks: Positive = Field(description="L: chunks of a video, an independent first frame not counted")
    chunk_frames: Positive = Field(description="latent frames of a chunk")
    independent_first_frame: bool = Field(False, description="one more chunk, of a single latent frame, comes first")
    latent_height: Positive = Field(description="rows of a latent frame: the video's height in pixels over the VAE's factor, 8 for Wan")
    latent_width: Positive = Field(description="columns of a latent frame")
    fps: Positive = Field(description="frames per second of the decoded video")
    decode_frames: Positive = Field(1, description="latent frames that the VAE decodes in one call: more is faster for small videos only")

    @property
    def count(self) -> int:
        """All chunks, an independent first frame included: where a pivot can lie."""
        return self.chunks + self.independent_first_frame


class SamplerConfig(Section):
    """The few-step sampler of one chunk."""

    kind: Literal["consistency", "ode"] = Field("consistency", description="consistency: predict, re-noise freshly; ode: Euler steps")
    steps: Timesteps = Field(description="T timesteps, decreasing, in (0, 1000]")
    first_chunk_steps: Timesteps | None = Field(None, description="timesteps of the first chunk, if it has its own")
    warp: bool = Field(description="steps index the shifted table of 1000 timesteps (750 -> 937.5 for shift 5) instead of being timesteps")
    shift: PositiveFloat = Field(description="s of sigma = s u / (1 + (s - 1) u)")
    context_noise: float = Field(0.0, ge=0, le=1000, description="timestep at which a finished chunk enters the cache")

    @model_validator(mode="after")
    def _warped_steps_are_entries(self) -> SamplerConfig:
        if self.warp:
            for name in ("steps", "first_chunk_steps"):
                if any(step != int(step) for step in getattr(self, name) or []):
                    raise ValueError(f"sampler.{name} {getattr(self, name)} must be whole with sampler.warp true: they index a table")
        return self


class CacheConfig(Section):
    """Which finished frames a chunk attends to."""

    variant: Literal["self_forcing", "longlive", "longlive_infinity", "infinity_rope"] = Field(
        "self_forcing", description="the published generator whose cache and positions are used"
    )
    window: Positive | None = Field(None, description="visible latent frames, the chunk being denoised included; null: all")
    sink: int = Field(0, ge=0, description="first latent frames that never leave the window")
    global_sink: bool = Field(True, description="the sink survives a prompt switch (longlive)")


class RolloutConfig(Section):
    """How a group of candidates is made."""

    group_size: int = Field(12, description="G: candidates of a group, at least 2")
    noise_strength: float = Field(0.5, gt=0, le=1, description="sigma: eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i")
    pivot: int | Literal["shared", "per_group"] = Field(
        "shared", description="p: shared: one random chunk an iteration; per_group: one a group; a number: always that chunk, from 1"
    )
    prompts_per_iteration: Positive = Field(1, description="groups of an iteration")
    branches_per_wave: Positive | None = Field(None, description="finish so many branches at once: less memory, same result; null: all")
    decode_branches: Positive | None = Field(None, description="decode so many branches at once: less memory, same result; null: all")
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto", description="replay the denoising steps of a chunk as one CUDA graph; auto: where launches, not arithmetic, take the time"
    )

    @field_validator("group_size")
    @classmethod
    def _group_has_neighbours(cls, size: int) -> int:
        if size < 2:
            raise ValueError(f"a group of {size} has no advantage: rewards are compared inside the group; give at least 2 (the paper: 12)")
        return size


class LoraConfig(Section):
    """The adapter, the only thing that is trained."""

    rank: Positive = Field(64, description="r of B A x")
    alpha: PositiveFloat = Field(128, description="the adapter is scaled by alpha / rank")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
        min_length=1,
        description="linear layers, by their name or its last part",
    )


class OptimizerConfig(Section):
    """AdamW on float32 master weights, no warm-up."""

    lr: PositiveFloat = Field(1e-5, description="learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of the learning rate; the others fall to 0")
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = Field((0.9, 0.999), description="Adam's two decays")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled weight decay")
    gradient_clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")


class TrainConfig(Section):
    """Where groups come from, how long, and what is kept."""

    mode: Literal["on_policy", "semi_on_policy", "off_policy"] = Field(
        "on_policy",
        description="groups from the policy itself, or from a buffer of the generator without adapter; off_policy: the latter without clip",
    )
    buffer: str | None = Field(None, min_length=1, description="directory that `python -m arcopo_fast.collect` filled; null: on_policy")
    iterations: Positive = Field(100, description="rollout, reward and update, so many times")
    save_every: int = Field(50, ge=0, description="iterations between checkpoints; 0: only at the end")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints that are kept")
    threads: Positive | None = Field(None, description="CPU threads of PyTorch; null: its own choice")


class RewardServersConfig(Section):
    """Rewards in processes of their own, `python -m arcopo_fast.rewards serve`. Their token, if any, is ARCOPO_REWARD_TOKEN's."""

    addresses: dict[str, str] = Field(default_factory=dict, description="by the reward's name, as in {toy_vq: http://127.0.0.1:8123}")
    frames: Literal["float32", "uint8"] = Field(
        "float32", description="on their way to a server; uint8: a quarter of the bytes, in steps of 1/255; float32: the score is the same"
    )
    timeout: PositiveFloat = Field(600.0, description="seconds until an answer must come; then the server counts as away")
    give_up_after: PositiveFloat = Field(3600.0, description="seconds that a run waits for a server before it ends; it can be resumed")


class EvaluationConfig(Section):
    """Before and after: the same prompts, the same noise."""

    prompts: Positive = Field(8, description="prompts, the first of the evaluation set")
    videos_per_prompt: Positive = Field(4, description="videos of each prompt")
    seed: int = Field(1234, ge=0, le=2**32 - 1, description="of the noise; never used in training")
    sample_videos: int = Field(4, ge=0, description="before/after pairs that are written as mp4")

    @model_validator(mode="after")
    def _samples_exist(self) -> EvaluationConfig:
        if self.sample_videos > self.prompts * self.videos_per_prompt:
            raise ValueError(
                f"evaluation.sample_videos {self.sample_videos} is more than the {self.prompts * self.videos_per_prompt} videos "
                "of evaluation.prompts x evaluation.videos_per_prompt"
            )
        return self


class RunConfig(Section):
    """Where a run leaves what it made."""

    directory: str = Field("runs", min_length=1, description="the run goes to <directory>/<name>, or <name>-2 and so on if that exists")
    overwrite: bool = Field(False, description="replace an earlier run of that name instead")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")


class Config(Section):
    """Everything that a run can be told."""

    name: str = Field(description="of the run and its directory")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of every random draw")
    prompts: str = Field(
        "toy", min_length=1, description='"toy": captions of the toy world; "bench": plain sentences; else a text file, one prompt a line'
    )
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    video: VideoConfig
    sampler: SamplerConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)  # of the objective that `kind` names: see `config_class`
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    rewards: dict[str, float] = Field(
        description="weight of each reward, by name; at least one; one of your own is named package.module:function"
    )
    reward_servers: RewardServersConfig = Field(default_factory=RewardServersConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @field_validator("name")
    @classmethod
    def _names_a_directory(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"a run's name is made of letters, digits, '_', '-' and '.'; given {name!r}")
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
        if cache.variant == "infinity_rope" and cache.window is not None and cache.sink < 1:
            raise ValueError("cache.sink must be at least 1 for infinity_rope with a window")
        if isinstance(rollout.pivot, int) and not 1 <= rollout.pivot <= video.count:
            raise ValueError(f"rollout.pivot {rollout.pivot} is beyond the video of L = {video.count} chunks; give 1 to {video.count}")
        if (self.train.mode == "on_policy") != (self.train.buffer is None):
            raise ValueError(
                f"train.mode {self.train.mode} and train.buffer {self.train.buffer or 'null'} do not go together: on_policy makes its "
                "groups itself, the other modes read them from a buffer (python -m arcopo_fast.collect)"
            )
        if strangers := [name for name in self.reward_servers.addresses if name not in self.rewards]:
            raise ValueError(f"reward_servers.addresses has {strangers[0]!r}, which is not among the rewards {', '.join(self.rewards)}")
        if objective.anchors_per_update > rollout.group_size:
            raise ValueError(
                f"objective.anchors_per_update {objective.anchors_per_update} is more than rollout.group_size {rollout.group_size}: "
                "anchors are drawn without replacement"
            )
        return self


# Objectives ------------------------------------------------------------------------------------------------------------------------


def objective_class(kind: str) -> Any:
    """The objective that a recipe's `objective.kind` names: its module's `OBJECTIVE`, which has a class `Settings`.

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
    raise UserError(f"objective.kind: no objective {kind!r} ({problem}); give {known}")


def objectives() -> list[str]:
    """Names of the objectives in the package."""
    found = [entry.name.removesuffix(".py") for entry in (files("arcopo_fast") / "objectives").iterdir() if entry.name.endswith(".py")]
    return sorted(name for name in found if name not in ("__init__", "base", "advantage"))


@cache
def config_class(kind: str) -> type[Config]:
    """`Config` with the settings of one objective."""
    settings = objective_class(kind).Settings
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, objective=(settings, Field(default_factory=settings)))


# YAML ------------------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """The 1.2 core rules."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either rule set would take for something else than a string; lists stay on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBER_START = list("-+.0123456789")
_CORE_RULES = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", _NUMBER_START),
    ("tag:yaml.org,2002:float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _NUMBER_START),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_RULES:
    for _rules in (_Loader, _Dumper):
        _rules.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
for _kind in (list, tuple):
    _Dumper.add_representer(_kind, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True))


@dataclass
class _Document:
    """A YAML mapping and the line of each dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def _read_yaml(text: str, source: str) -> Any:
    """A YAML document; `_Document` if it is a mapping."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if isinstance(node, yaml.MappingNode):
            _note_keys(node, "", lines, source, frozenset())
        value = None if node is None else loader.construct_document(node)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = _line(source, mark.line + 1) if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()
    return _Document(value, lines) if isinstance(value, dict) else value


def _line(source: str, line: int) -> str:
    """An override has one line only."""
    return source if source.startswith("override ") else f"{source}:{line}"


def _note_keys(node: yaml.MappingNode, prefix: str, lines: dict[str, int], source: str, above: frozenset[int]) -> None:
    """Remember the line of each key; a key that stands twice in one mapping is an error."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = _line(source, line)
        if key.tag != "tag:yaml.org,2002:str":
            raise UserError(f"{where}: a key must be a name; given {getattr(key, 'value', key)!r}")
        path = f"{prefix}{key.value}"
        if path in lines:
            raise UserError(f"{where}: the key {path} stands twice; remove one")
        lines[path] = line
        if isinstance(value, yaml.MappingNode) and id(value) not in above:
            _note_keys(value, f"{path}.", lines, source, above | {id(node)})


# Reading ---------------------------------------------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in (files("arcopo_fast") / "recipes").iterdir() if entry.name.endswith(".yaml")
    )


def load_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides, in their order.

    Args:
        recipe: a path to a YAML file, or the name of a recipe of the package, with or without ".yaml"; None: the default.
        overrides: `key.sub=value`; the value is YAML, so `sampler.steps=[1000, 500]` works.

    Raises:
        UserError: with one line, for anything that cannot be used.
    """
    source, text = _find_recipe(recipe or DEFAULT_RECIPE)
    document = _read_yaml(text, source)
    if not isinstance(document, _Document):
        raise UserError(f"{source}: a recipe maps keys to values; this file {'is empty' if document is None else 'holds something else'}")
    origins = {path: f"{source}:{line}" for path, line in document.lines.items()}
    for override in overrides:
        _apply(document.values, override, origins)
    objective = document.values.get("objective")
    kind = objective.get("kind", DEFAULT_OBJECTIVE) if isinstance(objective, dict) else DEFAULT_OBJECTIVE
    try:
        model = config_class(kind if isinstance(kind, str) else DEFAULT_OBJECTIVE)
    except UserError as error:
        raise UserError(f"{origins.get('objective.kind') or origins['objective']}: {error}") from None
    try:
        return model.model_validate(document.values)
    except ValidationError as error:
        raise UserError(_explain(error, model, origins, source)) from None


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML; reading it gives the same configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def _find_recipe(recipe: str) -> tuple[str, str]:
    """The recipe's name for messages, and its text."""
    path = Path(recipe)
    named = files("arcopo_fast") / "recipes" / f"{recipe.removesuffix('.yaml')}.yaml"
    try:
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return recipe, path.read_text(encoding="utf-8")
        if "/" not in recipe and named.is_file():
            return named.name, named.read_text(encoding="utf-8")
        if path.is_file():
            return recipe, path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {recipe}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read the recipe {recipe}: it is not UTF-8 text") from None
    near = difflib.get_close_matches(recipe.removesuffix(".yaml"), recipes(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown recipe {recipe!r}: {hint}give the path of a YAML file or one of: {', '.join(recipes())}")


def _apply(values: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    """Set one dotted key."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    origin = f"override {shorten(override)!r}"
    if not equals or not all(keys) or any(character.isspace() for character in path):
        raise UserError(f"{origin}: an override has the form key.sub=value, as in optimizer.lr=1e-4")
    value = _read_yaml(text, origin)
    here: dict[str, Any] = values
    for depth, key in enumerate(keys[:-1], start=1):
        if here.get(key) is None:
            here[key] = {}
        if not isinstance(here[key], dict):
            raise UserError(f"{origin}: {'.'.join(keys[:depth])} is a value, not a section")
        here = here[key]
    here[keys[-1]] = value.values if isinstance(value, _Document) else value
    for known in [known for known in origins if known == path or known.startswith(f"{path}.")]:
        del origins[known]
    origins[path] = origin


# Explaining ------------------------------------------------------------------------------------------------------------------------


def shorten(text: str, length: int = 80) -> str:
    """At most `length` characters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _explain(error: ValidationError, model: type[Config], origins: Mapping[str, str], source: str) -> str:
    """The first problem, in one line. Unknown keys come first: a misspelt key often causes the other problems."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    place = _locate(model, first["loc"])
    if first["type"] == "extra_forbidden":
        problem = f"unknown key {place.path}{_suggest(model, place.path)}"
    elif first["type"] == "missing":
        problem = f"the key {place.path} is missing: {place.meaning}"
    elif first["type"] == "value_error":
        problem = f"{place.path}: {first['ctx']['error']}" if place.key else str(first["ctx"]["error"])
    else:
        problem = f"{place.path}: expected {place.expected}; given {shorten(_shown(first['input']))}"
    others = len({_locate(model, problem["loc"]).path for problem in problems} - {place.path})
    more = f" (and {others} more problem{'s' * (others > 1)})" if others else ""
    return f"{_origin(place, problem, origins, source)}: {problem}{more}"


@dataclass(frozen=True)
class _Place:
    """Where in the tree a problem lies. key: it is a single key, not a section; expected: what that takes, in words."""

    path: str
    key: bool
    expected: str
    meaning: str


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's location down the tree, leaving out the branches of a union that it tried."""
    path = ""
    for index, step in enumerate(location):
        path += f".{step}" if path else str(step)
        info = model.model_fields.get(str(step))
        if info is None:
            return _Place(path, True, "nothing", "")
        section = _section(info)
        if section is None:
            inner = location[index + 1] if index + 1 < len(location) else None
            kind, arguments = get_origin(info.annotation), get_args(info.annotation)
            if kind is dict and inner is not None:
                return _Place(f"{path}.{inner}", True, _describe(arguments[1]), "")
            if kind in (list, tuple) and isinstance(inner, int):
                return _Place(f"{path}[{inner}]", True, _describe(arguments[0]), _expected(info))
            return _Place(path, True, _expected(info), info.description or "")
        model = section
    return _Place(path, False, "a section with keys of its own", model.__doc__ or "")


def _origin(place: _Place, problem: str, origins: Mapping[str, str], source: str) -> str:
    """The override or the line of the recipe that a problem comes from."""
    path = place.path.partition("[")[0]
    overridden = [known for known, origin in origins.items() if origin.startswith("override")]
    if not place.key:  # values that contradict each other: an override that is named, or that lies in the section
        candidates = [known for known in overridden if known in problem] + [known for known in overridden if known.startswith(f"{path}.")]
        return origins[candidates[0]] if candidates else source
    above = [path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)]
    below = [known for known in origins if known.startswith(f"{path}.")]
    return next((origins[known] for known in [*above, *below] if known in origins), source)


def _section(info: FieldInfo) -> type[Section] | None:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, sections included, in the order of the tree."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        section = _section(info)
        if section:
            yield from _fields(section, f"{prefix}{name}.")


def _suggest(model: type[Config], path: str) -> str:
    """The key that was probably meant: a sibling, else the same name elsewhere, else anything similar."""
    known = [name for name, _ in _fields(model)]
    parent, _, leaf = path.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    same = [name for name in known if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(path, siblings, n=1, cutoff=0.75) or same or difflib.get_close_matches(path, siblings + known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; the keys here are {', '.join(name.rpartition('.')[2] for name in siblings)}" if siblings else ""


def _expected(info: FieldInfo) -> str:
    """In words, what a field takes."""
    return _describe(info.annotation, info.metadata)


def _describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        more = [item for entry in arguments[1:] for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
        return _describe(arguments[0], [*more, *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(branch) for branch in arguments)
    if origin is Literal:
        return " or ".join([", ".join(arguments[:-1]), arguments[-1]] if len(arguments) > 1 else arguments)
    if origin is dict:
        return f"names with {_describe(arguments[1])} each"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    if origin is list:
        return f"a list of {_describe(arguments[0]).replace('a number', 'numbers').replace('a text', 'texts')}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}[annotation]
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in metadata
        for kind, name, sign in ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
        if isinstance(limit, kind)
    ]
    return " ".join([words, " and ".join(limits)]).strip()


def _shown(value: Any) -> str:
    """A value as YAML would show it, with its type where the text alone would mislead."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return f"a section with the keys {', '.join(map(str, value))}" if value else "an empty section"
    return str(value) if not isinstance(value, float) or math.isfinite(value) else f"{value}, which is not finite"


def keys_help() -> str:
    """Every key that a recipe or an override can set: its default, what it takes and what it means."""
    lines = []
    fields = list(_fields(config_class(DEFAULT_OBJECTIVE)))
    for path, info in sorted(fields, key=lambda item: "." in item[0] or _section(item[1]) is not None):  # single keys first
        section = _section(info)
        lines += [f"\n{path}: {section.__doc__}"] if section else _key_help(path, info)
    shown = dict(fields)
    for kind in objectives():
        settings = objective_class(kind).Settings
        own = {f"objective.{name}": info for name, info in settings.model_fields.items()}
        different = [
            line
            for path, info in own.items()
            if path != "objective.kind" and (path not in shown or _default(info) != _default(shown[path]))
            for line in _key_help(path, info)
        ]
        if kind != DEFAULT_OBJECTIVE:
            lines += [f"\nobjective, with objective.kind={kind}: {settings.__doc__}", *different]
    return "\n".join(lines)


def _key_help(path: str, info: FieldInfo) -> list[str]:
    default = "(required)" if info.is_required() else f"= {yaml.dump([_default(info)], Dumper=_Dumper, width=1000).strip()[1:-1]}"
    return [f"  {path} {default}", f"      {info.description} [{_expected(info)}]"]


def _default(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True)
