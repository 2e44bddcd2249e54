"""One AR-CoPO iteration, the plain way: G videos generated from start to end one after the other, decoded whole, judged, replayed, AdamW.

Follows AR-CoPO (arXiv 2603.17461) as code for it would be written on top of Self-Forcing's inference and DanceGRPO's training loop. Nothing
is shared between branches, though all they have in common until the pivot is equal; batch 1 throughout; the keys and values of the noisy
chunk are written at every step; every chunk gets a clean pass, the last included; one backward pass for each anchor and step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcopo_fast.config.schema import Config
from arcopo_fast.model.causal_wan import CausalWan
from arcopo_fast.objectives.copo import CopoSettings
from arcopo_fast.rewards.base import Reward, score
from arcopo_fast.rollout.noise import KeyedNoise, keyed_rng
from arcopo_fast.rollout.sampler import Steps
from arcopo_fast.rollout.scheduler import Schedule
from arcopo_fast.rollout.stream import VideoShape
from arcopo_fast.runtime.profiling import stage
from benchmarks.reference.wan import DenseCache, ReferenceWan

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def _supported(config: Config) -> CopoSettings:
    """Return the recipe's objective: this path writes one algorithm, not every option of it.

    Raises:
        ValueError: a setting that it has not.
    """
    objective = config.objective
    if not isinstance(objective, CopoSettings):
        raise ValueError(f"the reference path has objective.kind 'copo' only; got {objective.kind!r}")
    needed = {"distance": "consistency", "distance_reduction": "mean", "steps": "all", "skip_last_step": False, "context": "rollout"}
    for name, value in needed.items():
        if (given := getattr(objective, name)) != value:
            raise ValueError(f"the reference path has objective.{name} {value!r} only; got {given!r}")
    if objective.tau == "auto" or config.sampler.kind != "consistency" or config.cache.variant != "self_forcing":
        raise ValueError("the reference path has a fixed tau, the consistency sampler and the self_forcing cache only")
    return objective


def adamw(config: Config, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Return the recipe's optimizer, with PyTorch's eps."""
    settings = config.optimizer
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


@dataclass
class Candidates:
    """The group: every step's inputs and predictions of the pivot chunk [T, G, F, C, h, w] float32, all latents [G, frames, C, h, w]."""

    inputs: Tensor
    predictions: Tensor
    latents: Tensor


@dataclass
class Result:
    """The results of an iteration, to be compared with another's. rewards: by name, [G]; advantages [G] float64."""

    latents: Tensor
    rewards: dict[str, Tensor]
    advantages: Tensor
    statistics: dict[str, float]


class Reference:
    """Runs the iteration of a recipe on a model with LoRA adapters.

    Args:
        vae: diffusers' own, or None: nothing is decoded and judged, and advantages must be given.
        rewards: their sum, weighted as in the recipe, is what advantages are made of.
        mp4: frames reach the rewards through an H.264 file in memory, as where rewards read video files.
    """

    def __init__(
        self,
        config: Config,
        model: CausalWan,
        vae: AutoencoderKLWan | None = None,
        rewards: Mapping[str, Reward] | None = None,
        *,
        mp4: bool = False,
    ) -> None:
        self.config, self.objective = config, _supported(config)
        self.wan = ReferenceWan(model)
        self.vae = vae
        self.rewards = dict(rewards or {})
        self.mp4 = mp4
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = adamw(config, self.parameters)
        self.shape = VideoShape.of(config.video, model.config.in_channels)
        tokens = model.config.tokens_per_frame(self.shape.height, self.shape.width)
        self.cache = DenseCache(model, self.shape.frames, tokens, config.cache.window, config.cache.sink)

    def iteration(
        self, text: Tensor, prompt: str, noise: KeyedNoise, pivot: int, *, advantages: Tensor | None = None, branches: int | None = None
    ) -> Result:
        """Roll out, decode, reward, update. branches: run so many of the G branches only, and let them stand for all."""
        text = text.to(self.wan.model.device)  # once: every video and every replay encodes it
        candidates = self.rollout(text, noise, pivot, branches)
        rewards: dict[str, Tensor] = {}
        if self.vae is not None:
            measured = branches or len(candidates.latents)
            rewards = self.judge(candidates.latents[:measured], prompt)
            rewards = {
                name: values.repeat(len(candidates.latents) // measured + 1)[: len(candidates.latents)] for name, values in rewards.items()
            }
            advantages = self.advantages(rewards)
        if advantages is None:
            raise ValueError("without a VAE there are no rewards: give the advantages")
        statistics = self.update(candidates, advantages.to(candidates.latents.device), text, noise, pivot)
        return Result(candidates.latents, rewards, advantages, statistics)

    # Rollout

    @torch.no_grad()
    def rollout(self, text: Tensor, noise: KeyedNoise, pivot: int, branches: int | None = None) -> Candidates:
        """The group's videos, one after the other."""
        size = self.config.rollout.group_size
        measured = branches or size
        draws = self.draw(noise, pivot)
        videos = [self.video(text, draws, pivot, branch) for branch in range(measured)]
        chosen = [videos[branch % measured] for branch in range(size)]
        inputs, predictions = (torch.cat([video[part] for video in chosen], dim=1) for part in (0, 1))
        return Candidates(inputs, predictions, torch.cat([video[2] for video in chosen]))

    def draw(self, noise: KeyedNoise, pivot: int) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        """All noise of the iteration, on the device: each chunk's initial noise and re-noise, the pivot's initial noise of each branch."""
        settings, device = self.config.rollout, self.wan.model.device
        chunks = range(self.shape.chunks)
        initial = [noise.initial(chunk).to(device) for chunk in chunks]
        renoise = [[noise.renoise(chunk, step).to(device) for step in range(len(self.steps_of(chunk)) - 1)] for chunk in chunks]
        return initial, renoise, noise.neighbors(pivot, range(settings.group_size), settings.noise_strength).to(device)

    def video(
        self, text: Tensor, draws: tuple[list[Tensor], list[list[Tensor]], Tensor], pivot: int, branch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One whole video: the pivot chunk's inputs and predictions [T, 1, F, C, h, w], and the latents [1, frames, C, h, w]."""
        initial, renoise, neighbors = draws
        text_cache = self.wan.encode_text(text)
        latents: list[Tensor] = []
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        frame = 0
        for chunk in range(self.shape.chunks):
            x = neighbors[branch : branch + 1] if chunk == pivot else initial[chunk]
            steps = self.steps_of(chunk)
            with stage("prefix" if chunk < pivot else "denoise"):
                for step in range(len(steps)):
                    clean = self.predict(x, steps, step, text_cache, frame, write=True)
                    if chunk == pivot:
                        kept[0].append(x)
                        kept[1].append(clean)
                    if step + 1 < len(steps):
                        x = renoised(clean, renoise[chunk][step], steps.sigmas[step + 1])
            with stage("prefix" if chunk < pivot else "clean"):
                self.wan(clean, self.config.sampler.context_noise, text_cache, self.cache, frame, write=True)
            latents.append(clean)
            frame += clean.shape[1]
        return torch.stack(kept[0]), torch.stack(kept[1]), torch.cat(latents, dim=1)

    def predict(self, x: Tensor, steps: Steps, step: int, text: list[tuple[Tensor, Tensor]], frame: int, *, write: bool) -> Tensor:
        """x0hat [1, F, C, h, w] = x - sigma flow, in float64, rounded to float32 or the model's wider dtype."""
        flow = self.wan(x, steps.timesteps[step], text, self.cache, frame, write=write)
        clean = x.to(flow.dtype).double() - steps.sigmas[step] * flow.double()
        return clean.to(torch.promote_types(flow.dtype, torch.float32))

    def steps_of(self, chunk: int) -> Steps:
        sampler = self.config.sampler
        listed = sampler.first_chunk_steps if chunk == 0 and sampler.first_chunk_steps is not None else sampler.steps
        return Steps.from_schedule(Schedule(sampler.shift), listed, warp=sampler.warp)

    # Rewards

    @torch.no_grad()
    def judge(self, latents: Tensor, prompt: str) -> dict[str, Tensor]:
        """Decode and judge one video after the other: [G] by reward."""
        scores: dict[str, list[Tensor]] = {}
        for video in latents.split(1):
            with stage("decode"):
                frames = self.decode(video)
            with stage("reward"):
                if self.mp4:
                    frames = through_mp4(frames)
                for name, values in score(self.rewards, frames, [prompt]).items():
                    scores.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in scores.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """A whole video [1, frames, C, h, w] -> [1, pixel frames, 3, H, W] in [0, 1]."""
        assert self.vae is not None
        config = self.vae.config
        mean, std = (torch.tensor(config[name], device=latents.device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        z = latents.float().transpose(1, 2) * std + mean
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample
        return (pixels.transpose(1, 2).float() * 0.5 + 0.5).clamp(0, 1)

    def advantages(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """(r - mean r) / std r of the weighted sum, [G] float64."""
        total = torch.stack([self.config.rewards[name] * values.double() for name, values in rewards.items()]).sum(dim=0)
        return (total - total.mean()) / total.std(correction=0).clamp_min(self.objective.advantage_std_floor)

    # Update

    def update(self, candidates: Candidates, advantages: Tensor, text: Tensor, noise: KeyedNoise, pivot: int) -> dict[str, float]:
        """All policy updates. The cache still holds the frames before the pivot, which are the same for every branch."""
        settings = self.objective
        items = [list(self.items(noise, pivot, update)) for update in range(settings.updates)]
        statistics: dict[str, list[float]] = {}
        with stage("replay"), torch.no_grad():  # predictions of later updates' anchors by the policy of the rollout
            known = [[self.replay(candidates, text, pivot, *item) for item in items[update]] for update in range(1, settings.updates)]
        for update, pairs in enumerate(items):
            self.optimizer.zero_grad()
            ratios = []
            with stage("replay"):
                for index, (step, anchor) in enumerate(pairs):
                    prediction = self.replay(candidates, text, pivot, step, anchor)
                    old = known[update - 1][index] if update else prediction.detach()
                    loss, ratio = surrogate(
                        prediction, old, candidates.predictions[step], advantages, tau=float(settings.tau), clip=settings.clip
                    )
                    (loss / len(pairs)).backward()
                    ratios.append(ratio)
            with stage("optimizer"):
                norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
                factor = min(1.0, (self.config.optimizer.gradient_clip or math.inf) / norm.item())
                for parameter in self.parameters:
                    if parameter.grad is not None and factor < 1:
                        parameter.grad *= factor
                statistics.setdefault("gradient_norm", []).append(norm.item())
                self.optimizer.step()
            for name, value in ratio_statistics(torch.stack(ratios), advantages, settings.clip).items():
                statistics[f"update{update + 1}/{name}"] = [value]
        self.optimizer.zero_grad()
        return {name: sum(values) / len(values) for name, values in statistics.items()}

    def items(self, noise: KeyedNoise, pivot: int, update: int) -> Iterator[tuple[int, int]]:
        """(step, anchor) pairs of an update: anchors without replacement, each at every step."""
        random = keyed_rng(*noise.id, "anchors", update)
        size = self.config.rollout.group_size
        for anchor in random.choice(size, size=min(self.objective.anchors_per_update, size), replace=False).tolist():
            for step in range(len(self.steps_of(pivot))):
                yield step, anchor

    def replay(self, candidates: Candidates, text: Tensor, pivot: int, step: int, anchor: int) -> Tensor:
        """The present weights' prediction [1, F, C, h, w] from an anchor's stored input; gradient stays in the chunk."""
        frame = sum(self.shape.chunk_frames[:pivot])
        x = candidates.inputs[step, anchor].unsqueeze(0)
        return self.predict(x, self.steps_of(pivot), step, self.wan.encode_text(text), frame, write=False)


def renoised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) x0 + sigma eps; sigma is a float32 number of the schedule's table."""
    level = torch.tensor(sigma, dtype=torch.float32)
    return (1 - level).item() * clean + level.item() * noise


def surrogate(
    prediction: Tensor, old: Tensor, candidates: Tensor, advantages: Tensor, *, tau: float, clip: float | None
) -> tuple[Tensor, Tensor]:
    """-J of one anchor and the ratios [G], in float64: pi(i) = softmax_i(-mean (x_i - x)^2 / tau), rho = pi / pi_old, clipped as in PPO."""

    def log_policy(x: Tensor) -> Tensor:
        distance = (candidates.double() - x.double()).flatten(1).square().mean(dim=1)
        return F.log_softmax(-distance / tau, dim=0)

    ratio = torch.exp(log_policy(prediction) - log_policy(old))
    clipped = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(), ratio.detach()


def ratio_statistics(ratio: Tensor, advantages: Tensor, clip: float | None) -> dict[str, float]:
    """Return the statistics of an update's ratios [N, G]."""
    change, radius = ratio - 1, clip or float("inf")
    lost = ((advantages > 0) & (change > radius)) | ((advantages < 0) & (change < -radius))
    return {
        "ratio_max": change.abs().max().item(),
        "ratio_std": change.std(correction=0).item(),
        "outside_clip": (change.abs() > radius).double().mean().item(),
        "live": (~lost)[:, advantages != 0].double().mean().item(),
    }


def through_mp4(frames: Tensor, fps: int = 16) -> Tensor:
    """Frames [1, F, 3, H, W] encoded to H.264 and decoded again, in memory: float32 in [0, 1], no longer quite the same."""
    import io

    import av

    from arcopo_fast.storage.video import CODECS

    pixels = (frames[0].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        codec = next(name for name in CODECS if name in av.codecs_available)
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        images = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(images).permute(0, 3, 1, 2).unsqueeze(0).to(frames.device, torch.float32) / 255
