"""Align a generator with AR-CoPO.

    python -m arcopo_fast.train [RECIPE] [key=value ...] [--dry-run] [--profile N]

One iteration, top to bottom: roll out a group of videos that differ in one chunk's initial noise, decode, reward, advantages, update the
LoRA adapter. Everything a run makes lies in its run directory.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcopo_fast.assemble import (
    Generator,
    build_engine,
    copo_settings,
    load_generator,
    load_held_out,
    load_prompts,
    load_rewards,
    video_shape,
)
from arcopo_fast.commands import RecipeParser, numbers, positive_int, run_command
from arcopo_fast.config import Config
from arcopo_fast.errors import UserError
from arcopo_fast.evaluation import Evaluation, evaluate
from arcopo_fast.model.lora import adapter_parameters, add_lora, save_adapter
from arcopo_fast.objectives.advantage import group_advantages, sum_rewards
from arcopo_fast.objectives.copo import CopoObjective
from arcopo_fast.planner import dry_run, over_plan
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rollout.decode import decode_branches
from arcopo_fast.rollout.engine import Engine, Group
from arcopo_fast.rollout.noise import KeyedNoise
from arcopo_fast.rollout.noise import generator as random_for
from arcopo_fast.runtime import profiling
from arcopo_fast.runtime.memory import resident, tune_for_cpu
from arcopo_fast.runtime.metrics import MetricsWriter
from arcopo_fast.runtime.profiling import Trace
from arcopo_fast.runtime.progress import Progress
from arcopo_fast.runtime.report import model_card, write_report
from arcopo_fast.runtime.run_dir import RunDirectory
from arcopo_fast.runtime.video import write_mp4


class Trainer:
    """A run: the generator with its adapter, the objective, and where its results go."""

    def __init__(self, config: Config) -> None:
        self.config = config
        RunDirectory.check(config)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        self.rewards: dict[str, Reward] = load_rewards(config)
        self.prompts = load_prompts(config)
        self.generator: Generator = load_generator(config)
        self.held_out = load_held_out(self.generator)
        lora = config.lora
        add_lora(self.generator.model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
        self.parameters = adapter_parameters(self.generator.model)
        self.shape = video_shape(config, self.generator)
        self.engine: Engine = build_engine(config, self.generator.model, self.shape)
        self.objective = CopoObjective(self.engine, copo_settings(config))
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay)

    def evaluate(self) -> Evaluation:
        return evaluate(self.config, self.generator, self.engine, self.prompts.evaluation, self.rewards, self.held_out)

    def rollout(self, iteration: int, index: int) -> tuple[Group, str]:
        """One group of videos for one prompt; prompt, pivot and every noise are functions of (seed, iteration, index)."""
        config = self.config
        random = random_for(config.seed, iteration, index, "prompt")
        prompt = self.prompts.training[random.integers(len(self.prompts.training))]
        pivot = config.rollout.pivot
        if isinstance(pivot, str):
            key = ("pivot",) if pivot == "shared" else ("pivot", index)
            pivot = 1 + int(random_for(config.seed, iteration, *key).integers(self.shape.chunks))
        group = self.engine.rollout(
            self.generator.encode_text([prompt]),
            KeyedNoise(self.shape.chunk, config.seed, iteration, index),
            pivot=pivot - 1,
            branches=config.rollout.group_size,
            sigma=config.rollout.noise_strength,
            branches_per_wave=config.rollout.branches_per_wave,
        )
        return group, prompt

    def judge(self, group: Group, prompt: str) -> dict[str, Tensor]:
        """Every reward's scores [G] of a group's videos, decoded and judged as many at a time as the recipe says."""
        device, offload = self.generator.model.device, self.config.generator.offload
        decoder = self.generator.decoder
        parts: list[dict[str, Tensor]] = []
        slices = decode_branches(decoder, group.latents, group.pivot, self.config.rollout.decode_branches)
        while True:
            with profiling.stage("decode"), resident(device, decoder.vae, offload=offload):
                frames = next(slices, None)
            if frames is None:
                return {name: torch.cat([part[name] for part in parts]) for name in self.rewards}
            with profiling.stage("reward"), resident(device, *self.rewards.values(), offload=offload):
                parts.append(score(self.rewards, frames, [prompt] * len(frames)))

    def set_learning_rate(self, iteration: int) -> float:
        """The learning rate of an iteration, a function of its number alone."""
        done = (iteration - 1) / self.config.train.iterations
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.config.optimizer.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.config.optimizer.lr
        return group["lr"]

    def iteration(self, iteration: int) -> dict[str, Any]:
        """Roll out, decode, reward, update; returns what metrics.jsonl keeps."""
        config = self.config
        groups: list[tuple[Group, Tensor]] = []
        logged: dict[str, list[float]] = {}
        with profiling.record(self.generator.model.device) as seconds, ExitStack() as stack:
            for index in range(config.rollout.prompts_per_iteration):
                group, prompt = self.rollout(iteration, index)
                stack.enter_context(group)
                components = self.judge(group, prompt)
                total = sum_rewards(components, config.rewards)
                for name, values in ({"reward": total} | {f"reward/{name}": values for name, values in components.items()}).items():
                    logged.setdefault(name, []).append(values.mean().item())
                    logged.setdefault(f"{name}_std", []).append(values.double().std(correction=0).item())
                logged.setdefault("pivot", []).append(group.pivot + 1)
                objective = config.objective
                advantages = group_advantages(
                    components,
                    config.rewards,
                    combine=objective.reward_combine,
                    kind=objective.advantage,
                    p=objective.quasi_norm_p,
                    std_floor=objective.advantage_std_floor,
                )
                groups.append((group, advantages))
            lr = self.set_learning_rate(iteration)
            statistics = self.objective.update(groups, self.optimizer, self.parameters, gradient_clip=config.optimizer.gradient_clip)
        return {name: sum(values) / len(values) for name, values in logged.items()} | statistics | {"lr": lr, "time": seconds}

    def over_plan(self) -> str | None:
        """What to say if the run has taken more of the device's memory than was planned."""
        device = self.generator.model.device
        return over_plan(self.config, torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None

    def save_checkpoint(self, run: RunDirectory, iteration: int) -> None:
        """checkpoints/step-N: the adapter, and what a continuation would need; complete or absent."""
        with run.checkpoint(iteration) as directory:
            save_adapter(directory / "adapter", self.generator.model, base_model=self.config.generator.checkpoint)
            torch.save({"iteration": iteration, "optimizer": self.optimizer.state_dict()}, directory / "trainer.pt")


def write_samples(run: RunDirectory, config: Config, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """The first evaluation videos as mp4, before and after, the same prompt and noise side by side."""
    videos = []
    for index in range(len(before.frames)):
        entry: dict[str, Any] = {"prompt": before.prompts[index], "seed": index}
        for name, evaluation in (("before", before), ("after", after)):
            entry[name] = f"samples/{name}-{index:02d}.mp4"
            write_mp4(run.path / entry[name], evaluation.frames[index], config.video.fps)
            entry[f"reward_{name}"] = evaluation.scores["reward"][index].item()
        videos.append(entry)
    return videos


def comparison(before: Evaluation, after: Evaluation, rewards: dict[str, Reward]) -> str:
    """The table that ends a run: each reward and held-out metric before and after, and the change in baseline standard deviations."""
    width = max(map(len, before.scores)) + 2
    lines = [f"{'':{width}}  before   after  change  in std of a video"]
    for name, values in before.scores.items():
        change = (after.scores[name] - values).mean().item()
        spread = values.std(correction=0).item()
        label = name if name in rewards or name == "reward" else f"({name})"
        lines.append(
            f"{label:{width}}  {values.mean():6.3f}  {after.scores[name].mean():6.3f}  {change:+6.3f}  {change / max(spread, 1e-9):+6.2f}"
        )
    return "\n".join([*lines, f"{len(before.prompts)} videos on fixed prompts and noises; metrics in (brackets) are never trained on"])


def train(config: Config, *, profile: int = 0) -> Path:
    """The whole run; returns its directory. profile: iterations of which a PyTorch trace is written, `profile/trace.json.gz`."""
    trainer = Trainer(config)
    trace = Trace(profile, of=config.train.iterations)
    run = RunDirectory.create(config)
    with MetricsWriter(run.path, tensorboard=config.run.tensorboard) as metrics:
        before = trainer.evaluate()
        with Progress(config.train.iterations) as progress, trace.to(run.path / "profile" / "trace.json.gz"):
            for iteration in range(1, config.train.iterations + 1):
                record = trainer.iteration(iteration)
                trace.step()
                metrics.write(iteration, record)
                progress.update(record["reward"])
                last = iteration == config.train.iterations
                if (last or iteration == 1) and (said := trainer.over_plan()):
                    warnings.warn(said, stacklevel=1)
                if last or (config.train.save_every and iteration % config.train.save_every == 0):
                    trainer.save_checkpoint(run, iteration)
    after = trainer.evaluate()
    document = {"before": before.summary(), "after": after.summary(), "videos": write_samples(run, config, before, after)}
    run.write("evaluation.json", json.dumps(document, indent=2) + "\n")
    save_adapter(run.path / "adapter", trainer.generator.model, base_model=config.generator.checkpoint)
    run.write("adapter/README.md", model_card(config, document))
    write_report(run.path)
    print(comparison(before, after, trainer.rewards))
    print(f"report: {run.path / 'report.html'}")
    return run.path


def command_line() -> RecipeParser:
    parser = RecipeParser("python -m arcopo_fast.train", "Align a generator with AR-CoPO.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the memory that the run needs by component, and the settings that fit each device; start nothing, need no GPU",
    )
    parser.add_argument(
        "--device-memory",
        type=numbers,
        metavar="24,40,80,141",
        default=(),
        help="with --dry-run: for devices of so many GB; without it, for the GPU that is here, else for these four",
    )
    parser.add_argument(
        "--profile", type=positive_int, metavar="N", default=0, help="write a PyTorch trace of N iterations into the run's directory"
    )
    return parser


def main(argv: list[str]) -> None:
    command = command_line().read_config(argv)
    if command is None:
        return
    config, options = command
    if options.device_memory and not options.dry_run:
        raise UserError("--device-memory only says what --dry-run is about; add --dry-run, or leave it out")
    if 0 in options.device_memory:
        raise UserError("--device-memory takes sizes above 0 GB")
    if options.profile and options.dry_run:
        raise UserError("--profile traces a run, and --dry-run starts none; leave one out")
    if options.dry_run:
        print(dry_run(config, options.device_memory))
        return
    tune_for_cpu()
    train(config, profile=options.profile)


if __name__ == "__main__":
    sys.exit(run_command(main))
