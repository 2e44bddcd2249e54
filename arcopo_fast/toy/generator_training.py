"""From clean latents to a few-step causal generator, on a CPU: a flow-matching teacher with teacher forcing, then distillation.

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
from typing import Callable, Iterator

import torch
from torch import Tensor

from arcopo_fast.config.schema import CacheConfig, SamplerConfig
from arcopo_fast.model.causal_wan import CachedRun, CausalWan, ChunkContext
from arcopo_fast.rollout.engine import Engine, VideoShape
from arcopo_fast.rollout.sampler import Kernel, next_input, predict

CONTEXT_NOISE = 0.1
"""Standard deviation of the noise on the clean chunks that the teacher sees as context: a generator's own chunks are never quite clean."""

TEXT_DROPOUT = 0.1
"""Share of the videos that the teacher sees without their text, so that it can be guided."""

Log = Callable[[dict[str, float | str]], None]


class TeacherForcing(ChunkContext):
    """Context of a batch of 2B rows, [noisy; clean]: both see the clean rows of the earlier chunks, with gradient."""

    keep = True

    def __init__(self, layers: int) -> None:
        self._new: list[tuple[Tensor, Tensor]] = []
        self._runs: list[list[CachedRun]] = [[] for _ in range(layers)]

    def cached(self, layer: int) -> list[CachedRun]:
        return self._runs[layer]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._new.append((key, value))

    def advance(self, frames: int) -> None:
        """The chunk just seen becomes context."""
        for runs, (key, value) in zip(self._runs, self._new):
            key, value = key.chunk(2)[1], value.chunk(2)[1]
            runs.append(CachedRun(torch.cat([key, key]), torch.cat([value, value]), frozen=False))
        self._new = []
        self.query_position = self.key_position = self.key_position + frames


def flow_matching_loss(
    model: CausalWan, latents: Tensor, text: Tensor, chunk_frames: tuple[int, ...], shift: float, random: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted flow over all chunks; latents [B, F, C, h, w] normalised, text [B, length, text_dim]."""
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
        seen = clean + CONTEXT_NOISE * torch.randn(clean.shape, generator=random)
        flow = model(torch.cat([noisy, seen]), timestep, encoded, context)
        losses.append((flow[:batch] - (noise - clean)).square().mean())
        context.advance(clean.shape[1])
    return torch.stack(losses).mean()


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, cosine to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(latents: Tensor, text: Tensor, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches."""
    while True:
        for index in torch.randperm(len(latents), generator=random).split(size):
            if len(index) == size:
                yield latents[index].float(), text[index]


def train_teacher(
    model: CausalWan,
    latents: Tensor,
    text: Tensor,
    chunk_frames: tuple[int, ...],
    *,
    steps: int,
    batch: int,
    lr: float,
    shift: float,
    seed: int,
    log: Log,
) -> CausalWan:
    """Train `model` in place on clean latents [N, F, C, h, w]; returns the exponential moving average of its weights."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = copy.deepcopy(model).requires_grad_(False)
    source, started, running = batches(latents, text, batch, random), time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps)
        videos, prompts = next(source)
        prompts = prompts * (torch.rand(batch, 1, 1, generator=random) >= TEXT_DROPOUT)
        loss = flow_matching_loss(model, videos, prompts, chunk_frames, shift, random)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        for mean, parameter in zip(average.parameters(), model.parameters()):
            mean.lerp_(parameter.detach(), 1 - decay)
        running = loss.item() if not step else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            log({"stage": "teacher", "step": step + 1, "loss": running, "seconds": time.monotonic() - started})
    return average


class GuidedTeacher:
    """Samples chunks by the flow's ODE with classifier-free guidance; with and without text it has a cache of its own."""

    def __init__(self, model: CausalWan, shape: VideoShape, steps: int, shift: float, guidance: float, batch: int) -> None:
        grid = [1 - i / steps for i in range(steps)]
        warped = [1000 * shift * t / (1 + (shift - 1) * t) for t in grid]
        pages = 2 * batch * sum(shape.chunk_frames)
        self.model, self.guidance = model, guidance
        self.engine = Engine(model, shape, SamplerConfig(steps=warped, warp=False, shift=1.0, kind="ode"), CacheConfig(), pages=pages)

    def start(self, text: Tensor) -> None:
        """New videos, of prompts [B, length, text_dim]."""
        self.states = [self.engine.start(text), self.engine.start(torch.zeros_like(text))]

    def sample(self, noise: Tensor) -> Tensor:
        """The next chunk, [B, frames, C, h, w], from its initial noise."""
        contexts = [state.cache.context(state.frame, noise.shape[1], keep=False) for state in self.states]
        x, steps = noise, self.engine.steps
        for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
            times = torch.full((len(x),), timestep), torch.full((len(x),), sigma)
            told, untold = (predict(self.model, x, *times, state.text, context) for state, context in zip(self.states, contexts))
            clean = untold + self.guidance * (told - untold)
            x = next_input(Kernel("ode"), x, clean, sigma, steps.next_sigma(step), None)
        return clean

    def append(self, chunk: Tensor, *, last: bool) -> None:
        """The chunk that the videos go on from."""
        for state in self.states:
            self.engine.append(state, chunk, last=last)

    def release(self) -> None:
        for state in self.states:
            state.cache.release()


def distil(
    teacher: CausalWan,
    text: Tensor,
    shape: VideoShape,
    sampler: SamplerConfig,
    *,
    steps: int,
    batch: int,
    lr: float,
    teacher_steps: int,
    teacher_shift: float,
    guidance: float,
    seed: int,
    log: Log,
) -> CausalWan:
    """A few-step student of `teacher`; one step is one chunk of `batch` videos. text: the prompts to draw from, [N, length, text_dim]."""
    random = torch.Generator().manual_seed(seed)
    student = copy.deepcopy(teacher).requires_grad_(True)
    average = copy.deepcopy(teacher).requires_grad_(False)
    students = Engine(student, shape, sampler, CacheConfig(), pages=batch * sum(shape.chunk_frames))
    guided = GuidedTeacher(teacher, shape, teacher_steps, teacher_shift, guidance, batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    done, started = 0, time.monotonic()
    while done < steps:
        prompts = text[torch.randint(len(text), (batch,), generator=random)]
        with torch.no_grad():
            ours = students.start(prompts)
            guided.start(prompts)
        for chunk, frames in enumerate(shape.chunk_frames):
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(done, steps)
            noise = torch.randn(batch, *shape.chunk(chunk), generator=random)
            with torch.no_grad():
                target = guided.sample(noise)
            context = ours.cache.context(ours.frame, frames, keep=False)
            encoded = student.encode_text(prompts)
            x, losses = noise, []
            for step, (timestep, sigma) in enumerate(zip(students.steps.timesteps, students.steps.sigmas)):
                prediction = predict(student, x, torch.full((batch,), timestep), torch.full((batch,), sigma), encoded, context)
                losses.append((prediction - target).square().mean())
                if step + 1 < len(students.steps):
                    fresh = torch.randn(noise.shape, generator=random)
                    x = next_input(Kernel(), x, prediction.detach(), sigma, students.steps.next_sigma(step), fresh)
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            decay = min(0.99, (done + 1) / (done + 10))
            for mean, parameter in zip(average.parameters(), student.parameters()):
                mean.lerp_(parameter.detach(), 1 - decay)
            last = chunk == shape.chunks - 1
            with torch.no_grad():
                students.append(ours, prediction.detach(), timestep=students.context_noise, last=last)
                guided.append(prediction.detach(), last=last)
            done += 1
            if done % 50 == 0 or done == steps:
                values = {f"loss_step{index + 1}": loss.item() for index, loss in enumerate(losses)}
                log({"stage": "distil", "step": done, **values, "seconds": time.monotonic() - started})
            if done == steps:
                break
        ours.cache.release()
        guided.release()
    return average
