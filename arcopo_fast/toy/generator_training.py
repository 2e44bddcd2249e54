"""Training of a few-step causal generator from clean latents, on a CPU: a flow-matching teacher with teacher forcing, then distillation.

The teacher learns v = eps - x0 for one chunk given the clean chunks before it, sometimes without its text. The student starts from the
teacher's weights. It makes videos with its own few steps; at every chunk the teacher, shown the same context, integrates the flow from the
same initial noise with classifier-free guidance, and the student's steps learn to land on that sample: the first from the noise alone, the
later ones from the student's own re-noised prediction. So the initial noise decides what the chunk shows and a re-noise only refines it, as
in the full-size generators.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

from arcopo_fast.config.sections import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CachedRun, CausalWan, ChunkContext
from arcopo_fast.rollout.engine import Engine
from arcopo_fast.rollout.sampler import StepRule, next_input, predict
from arcopo_fast.rollout.stream import Stream, VideoShape

CONTEXT_NOISE = 0.1
"""Standard deviation of the noise on the clean chunks that the teacher sees as context: a generator's own chunks are never quite clean."""

TEXT_DROPOUT = 0.1
"""Share of the videos that the teacher sees without their text, so that it can be guided."""

Log = Callable[[dict[str, float | str]], None]


class Course(NamedTuple):
    """The plan of a training.

    Attributes:
        steps: of the optimizer.
        batch: videos in a step.
        lr: the largest learning rate.
        seed: of all draws.
        log: receives a record now and then.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    log: Log


class Learner:
    """A model in training and the exponential moving average of its weights.

    Args:
        decay: the largest decay of the average.
    """

    def __init__(self, model: CausalWan, course: Course, *, weight_decay: float, decay: float) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.course = course
        self.decay = decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=course.lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.steps_done = 0
        self.started = time.monotonic()

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of a loss, clipped, at the learning rate of the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.lr * cosine(self.steps_done, self.course.steps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.decay, (self.steps_done + 1) / (self.steps_done + 10))
        for mean, parameter in zip(self.average.parameters(), self.model.parameters()):
            mean.lerp_(parameter.detach(), 1 - decay)
        self.steps_done += 1

    def log(self, stage: str, values: dict[str, float]) -> None:
        """Log every 50th step, and the last."""
        if self.steps_done % 50 == 0 or self.steps_done == self.course.steps:
            self.course.log({"stage": stage, "step": self.steps_done, **values, "seconds": time.monotonic() - self.started})


class TeacherForcing(ChunkContext):
    """The context of a batch of 2B rows, [noisy; clean]: both see the clean rows of the earlier chunks, with gradient."""

    keep = True

    def __init__(self, layers: int) -> None:
        self._new: list[tuple[Tensor, Tensor]] = []
        self._runs: list[list[CachedRun]] = [[] for _ in range(layers)]

    def cached(self, layer: int) -> list[CachedRun]:
        return self._runs[layer]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._new.append((key, value))

    def advance(self, frames: int) -> None:
        """Make the chunk just seen part of the context."""
        for runs, (key, value) in zip(self._runs, self._new):
            key, value = key.chunk(2)[1], value.chunk(2)[1]
            runs.append(CachedRun(torch.cat([key, key]), torch.cat([value, value]), frozen=False))
        self._new = []
        self.query_position = self.key_position = self.key_position + frames


def flow_matching_loss(
    model: CausalWan, latents: Tensor, text: Tensor, chunk_frames: tuple[int, ...], shift: float, random: torch.Generator
) -> Tensor:
    """Return the mean squared error of the flow predicted for all chunks of latents [B, F, C, h, w], normalized, and text [B, length,
    text_dim]."""
    batch = latents.shape[0]
    context = TeacherForcing(model.config.num_layers)
    encoded = model.encode_text(torch.cat([text, text]))
    losses = []
    for clean in latents.split(chunk_frames, dim=1):
        u = torch.rand(batch, generator=random)
        sigma = shift * u / (1 + (shift - 1) * u)
        noise = torch.randn(clean.shape, generator=random)
        scale = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - scale) * clean + scale * noise
        timestep = torch.cat([1000 * sigma, torch.zeros(batch)])[:, None]
        context_rows = clean + CONTEXT_NOISE * torch.randn(clean.shape, generator=random)
        flow = model(torch.cat([noisy, context_rows]), timestep, encoded, context)
        losses.append((flow[:batch] - (noise - clean)).square().mean())
        context.advance(clean.shape[1])
    return torch.stack(losses).mean()


def cosine(step: int, steps: int) -> float:
    """Return the learning-rate factor of a step: linear warm-up, cosine to 2 %."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(latents: Tensor, text: Tensor, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless shuffled batches."""
    while True:
        for index in torch.randperm(len(latents), generator=random).split(size):
            if len(index) == size:
                yield latents[index].float(), text[index]


def train_teacher(
    model: CausalWan, latents: Tensor, text: Tensor, chunk_frames: tuple[int, ...], course: Course, *, shift: float
) -> CausalWan:
    """Train `model` in place on clean latents [N, F, C, h, w]; return the exponential moving average of its weights."""
    random = torch.Generator().manual_seed(course.seed)
    learner = Learner(model, course, weight_decay=0.01, decay=0.995)
    source, running = batches(latents, text, course.batch, random), 0.0
    for step in range(course.steps):
        videos, prompts = next(source)
        prompts = prompts * (torch.rand(course.batch, 1, 1, generator=random) >= TEXT_DROPOUT)
        loss = flow_matching_loss(model, videos, prompts, chunk_frames, shift, random)
        learner.step(loss)
        running = loss.item() if not step else 0.98 * running + 0.02 * loss.item()
        learner.log("teacher", {"loss": running})
    return learner.average


class GuidedTeacher:
    """A sampler of chunks by the flow's ODE with classifier-free guidance; with and without text it has a cache of its own.

    Args:
        steps, shift: of its ODE.
        batch: number of videos that are made at once.
    """

    def __init__(self, model: CausalWan, shape: VideoShape, steps: int, shift: float, guidance: float, batch: int) -> None:
        grid = [1 - i / steps for i in range(steps)]
        warped = [1000 * shift * t / (1 + (shift - 1) * t) for t in grid]
        pages = 2 * batch * sum(shape.chunk_frames)
        self.model, self.guidance = model, guidance
        self.engine = Engine(model, shape, SamplerConfig(steps=warped, warp=False, shift=1.0, kind="ode"), CacheConfig(), pages=pages)

    def start(self, text: Tensor) -> None:
        """Begin new videos, of prompts [B, length, text_dim]."""
        self.states = [self.engine.start(text), self.engine.start(torch.zeros_like(text))]

    def sample(self, noise: Tensor) -> Tensor:
        """Return the next chunk, [B, F, C, h, w], from its initial noise."""
        contexts = [state.cache.context(state.frame, noise.shape[1], keep=False) for state in self.states]
        x, steps = noise, self.engine.steps
        for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
            times = torch.full((len(x),), timestep), torch.full((len(x),), sigma)
            predictions = [predict(self.model, x, *times, state.text, context) for state, context in zip(self.states, contexts)]
            with_text, without_text = predictions
            clean = without_text + self.guidance * (with_text - without_text)
            x = next_input(StepRule("ode"), x, clean, sigma, steps.next_sigma(step), None)
        return clean

    def append(self, chunk: Tensor, *, last: bool) -> None:
        """Add the chunk that the videos go on from."""
        for state in self.states:
            self.engine.append(state, chunk, last=last)

    def release(self) -> None:
        """Give the pages of the videos back."""
        for state in self.states:
            state.cache.release()


def distill(teacher: GuidedTeacher, text: Tensor, shape: VideoShape, sampler: SamplerConfig, course: Course) -> CausalWan:
    """Train a few-step student of `teacher`, and return the exponential moving average of its weights.

    One step is one chunk of `course.batch` videos. text: the prompts to draw from, [N, length, text_dim].
    """
    random = torch.Generator().manual_seed(course.seed)
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    learner = Learner(student, course, weight_decay=0.0, decay=0.99)
    engine = Engine(student, shape, sampler, CacheConfig(), pages=course.batch * shape.frames)
    while learner.steps_done < course.steps:
        prompts = text[torch.randint(len(text), (course.batch,), generator=random)]
        with torch.no_grad():
            videos = engine.start(prompts)
            teacher.start(prompts)
        for chunk in range(shape.chunks):
            noise = torch.randn(course.batch, *shape.chunk(chunk), generator=random)
            with torch.no_grad():
                target = teacher.sample(noise)
            chunk_latents, losses = imitate(engine, videos, prompts, noise, target, random)
            learner.step(torch.stack(losses).sum())
            last = chunk == shape.chunks - 1
            with torch.no_grad():
                engine.append(videos, chunk_latents, timestep=engine.context_noise, last=last)
                teacher.append(chunk_latents, last=last)
            learner.log("distil", {f"loss_step{index + 1}": loss.item() for index, loss in enumerate(losses)})
            if learner.steps_done == course.steps:
                break
        videos.cache.release()
        teacher.release()
    return learner.average


def imitate(
    engine: Engine, videos: Stream, prompts: Tensor, noise: Tensor, target: Tensor, random: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Denoise the next chunk in the student's few steps; return it, without gradient, and each step's mean squared distance to `target`."""
    batch, context = len(noise), videos.cache.context(videos.frame, noise.shape[1], keep=False)
    encoded = engine.model.encode_text(prompts)
    x, losses, steps = noise, [], engine.steps
    for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
        clean = predict(engine.model, x, torch.full((batch,), timestep), torch.full((batch,), sigma), encoded, context)
        losses.append((clean - target).square().mean())
        if step + 1 < len(steps):
            fresh = torch.randn(noise.shape, generator=random)
            x = next_input(StepRule(), x, clean.detach(), sigma, steps.next_sigma(step), fresh)
    return clean.detach(), losses
