"""Our generator against recorded outputs of the official ones: every file of the fixtures directory, every setting from its metadata.

Tolerances: float32 2e-5 absolute (values are O(1), up to 7), gradients 2e-5 of the tensor's largest element, bfloat16 6e-2 absolute with
the recorded x0 fed back at each step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from arcopo_kernels.qk_norm_rope import reference
from support import fixtures
from support.official import to_official_names
from torch import Tensor

from arcopo_fast.config.reading import load_config
from arcopo_fast.rollout.sampler import StepRule, next_input, predict
from arcopo_fast.rollout.scheduler import Schedule
from arcopo_fast.rollout.stream import Stream

FLOAT32, BFLOAT16 = 2e-5, 6e-2


def assert_close(name: str, ours: Tensor, official: Tensor, tolerance: float) -> None:
    assert ours.shape == official.shape, f"{name}: {tuple(ours.shape)} against {tuple(official.shape)}"
    error = (ours.double() - official.double()).abs().max().item()
    assert error <= tolerance, f"{name} differs by {error:.2e}, tolerance {tolerance:.0e}"


def rope_at_zero(key: Tensor, height: int, width: int) -> Tensor:
    """Official RoPE (complex128) of one frame's keys [..., tokens, H, D] at time position 0."""
    half = key.shape[-1] // 2
    pairs = (half - 2 * (half // 3), half // 3, half // 3)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = (torch.zeros(height * width), row.flatten(), column.flatten())
    angles = [p.double()[:, None] / 10000.0 ** (torch.arange(n, dtype=torch.float64) / n) for p, n in zip(positions, pairs)]
    turned = torch.cat(angles, dim=1)[:, None]
    complex_key = torch.view_as_complex(key.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(complex_key * torch.polar(torch.ones_like(turned), turned)).flatten(-2).to(key.dtype)


@pytest.fixture(scope="module", params=fixtures.ROLLOUTS, ids=lambda path: path.stem)
def loaded(request: pytest.FixtureRequest) -> fixtures.Case:
    return fixtures.load(request.param)


@pytest.fixture
def case(loaded: fixtures.Case) -> Iterator[fixtures.Case]:
    yield loaded
    assert loaded.engine.pool.pages_in_use == 0, "whatever becomes of a test, its pages are given back"


def test_there_are_fixtures() -> None:
    assert fixtures.ROLLOUTS or fixtures.GRADIENTS or fixtures.VAES, f"{fixtures.DIRECTORY} holds no fixture"
    assert all(fixtures.files_of(fixtures.OWN))


@pytest.mark.parametrize("path", fixtures.files_of(fixtures.OWN).rollouts, ids=lambda path: path.stem)
def test_recipes_are_what_the_official_runs_were_made_with(path: Path) -> None:
    """Of the repository's own files: what a recipe says of its generator is what the official run was told."""
    config, _ = fixtures.read(path)
    recipe, official = load_config(fixtures.recipe_of(config)), fixtures.overrides_of(config)
    told = ["sampler.steps", "sampler.warp", "sampler.shift", "sampler.first_chunk_steps", "video.chunk_frames", "cache.global_sink"]
    found = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in told}
    assert found == {key: official[key] for key in told}
    ours = load_config(fixtures.recipe_of(config), [f"{key}={json.dumps(value)}" for key, value in official.items()])
    assert list(ours.video.chunk_sizes) == config["chunk_sizes"]


def test_schedule(case: fixtures.Case) -> None:
    schedule = Schedule(case.config["shift"])
    assert_close("sigmas", schedule.sigmas, case.tensors["scheduler/sigmas"], 1e-7)
    assert_close("timesteps", schedule.timesteps, case.tensors["scheduler/timesteps"], 1e-4)
    assert_close("steps", torch.tensor(case.engine.steps.timesteps), case.tensors["denoising_step_list"], 1e-4)
    if case.config["first_chunk_steps"]:
        assert_close("first steps", torch.tensor(case.engine.first_steps.timesteps), case.tensors["denoising_step_list_first_chunk"], 1e-4)


def test_whole_rollout(case: fixtures.Case) -> None:
    """Every prediction, every cached key and value and the final latents, the whole loop running on our own results."""
    if case.config["dtype"] != "float32":
        pytest.skip("bfloat16 results are fed back step by step: see test_each_step")
    config, tensors = case.config, case.tensors

    def check_cache(stream: Stream, name: str) -> None:
        frames = tensors[f"{name}k"].shape[2] // config["frame_seqlen"]  # all that are visible, or the newest
        key, value = fixtures.cached(case.engine, stream, frames)
        if config["repo"] == "ir" and frames == stream.cache.frames:
            # The first frame of the video is cached roped at position 0 there; ours is roped at every read.
            tokens = config["frame_seqlen"]
            key[:, :, :tokens] = rope_at_zero(key[:, :, :tokens], config["h"] // 2, config["w"] // 2)
        assert_close(f"{name}k", key, tensors[f"{name}k"], FLOAT32)
        assert_close(f"{name}v", value, tensors[f"{name}v"], FLOAT32)

    with torch.no_grad(), case.stream() as stream:
        for index, latents in enumerate(case.initial_latents):
            case.engine.append(stream, latents)
            check_cache(stream, f"init{index}/")
        for chunk in range(len(case.sizes)):
            if case.switch(stream, chunk) is not None:
                check_cache(stream, f"chunk{chunk}/recache_")
            trajectory = case.engine.extend(stream, chunk, case.noise.initial(chunk), case.noise, last=False)
            for step, prediction in enumerate(trajectory.predictions):
                assert_close(f"chunk{chunk}/step{step}/x0", prediction, tensors[f"chunk{chunk}/step{step}/x0"], FLOAT32)
            check_cache(stream, f"chunk{chunk}/")
        assert_close("latents", torch.cat(stream.latents, dim=1), tensors["latents"], FLOAT32)


def test_generate(case: fixtures.Case) -> None:
    """The public call gives the official latents, although it skips the clean pass after the last chunk."""
    if case.config["dtype"] != "float32":
        pytest.skip("bfloat16 results are fed back step by step: see test_each_step")
    latents = case.engine.generate(case.text(), case.noise, initial_latents=case.initial_latents, switches=case.switches)
    assert_close("latents", latents, case.tensors["latents"], FLOAT32)


def test_each_step(case: fixtures.Case) -> None:
    """Each prediction from the recorded previous one: errors do not add up, so that bfloat16 can be judged."""
    tensors, tolerance = case.tensors, FLOAT32 if case.config["dtype"] == "float32" else BFLOAT16
    with torch.no_grad(), case.stream() as stream:
        for latents in case.initial_latents:
            case.engine.append(stream, latents)
        for chunk, size in enumerate(case.sizes):
            case.switch(stream, chunk)
            steps = case.engine.steps_of(chunk)
            stream.cache.make_room(size)
            context = stream.cache.context(stream.frame, size, keep=False)
            x = case.noise.initial(chunk)
            for step, (timestep, sigma) in enumerate(zip(steps.timesteps, steps.sigmas)):
                batch = torch.ones(x.shape[0])
                clean = predict(case.model, x, timestep * batch, sigma * batch, stream.text, context)
                recorded = tensors[f"chunk{chunk}/step{step}/x0"]
                assert_close(f"chunk{chunk}/step{step}/x0", clean.to(recorded.dtype), recorded, tolerance)
                if step + 1 < len(steps):
                    sigma, following = steps.sigmas[step], steps.sigmas[step + 1]
                    x = next_input(StepRule(), x, recorded.float(), sigma, following, case.noise.renoise(chunk, step))
                    x = x.to(recorded.dtype)
            case.engine.append(stream, recorded.float(), timestep=case.config["context_noise"])


def test_module_outputs(case: fixtures.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first network call, module by module: says where a difference begins."""
    if case.config["dtype"] != "float32" or not any(name.startswith("trace/") for name in case.tensors):
        pytest.skip("this fixture has no trace in float32")
    tensors, model, seen = case.tensors, case.model, {}

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, __, output: seen.setdefault(name, output))

    block = model.blocks[0]
    modules = {f"block{index}": module for index, module in enumerate(model.blocks)} | {
        "time_embedding": model.condition_embedder.time_embedder,
        "time_projection": model.condition_embedder.time_proj,
        "text_embedding": model.condition_embedder.text_embedder,
        "head": model.proj_out,
        "block0.self_attn": block.attn1.to_out[0],
        "block0.cross_attn": block.attn2.to_out[0],
        "block0.ffn": block.ffn,
    }
    handles = [watch(name, module) for name, module in modules.items()]

    # The norms are fused with what follows them: watched where the plain-PyTorch operators compute them.
    layer_norms = iter(["block0.norm1", "block0.norm3", "block0.norm2"])  # the official norm3 is diffusers' norm2, the second one
    rms_norms = {"block0.self_attn.norm_q": block.attn1.norm_q.weight, "block0.self_attn.norm_k": block.attn1.norm_k.weight}
    layer_norm, rms_norm = torch.nn.functional.layer_norm, reference.rms_norm

    def watched_layer_norm(*args: Any) -> torch.Tensor:
        output = layer_norm(*args)
        if name := next(layer_norms, None):
            seen[name] = output
        return output

    def watched_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        output = rms_norm(x, weight, eps)
        seen.update({name: output for name, theirs in rms_norms.items() if weight is theirs})
        return output

    monkeypatch.setattr(torch.nn.functional, "layer_norm", watched_layer_norm)
    monkeypatch.setattr(reference, "rms_norm", watched_rms_norm)
    chunks = case.initial_latents or [case.noise.initial(0)]
    timestep = 0.0 if case.initial_latents else case.engine.steps_of(0).timesteps[0]
    with torch.no_grad():
        flow = model(chunks[0], torch.full((1, 1), timestep), model.encode_text(case.text()))
    for handle in handles:
        handle.remove()
    assert flow is not None
    checked = 0
    for name, official in tensors.items():
        key = name.removeprefix("trace/")
        if name.startswith("trace/") and key in seen:
            ours = seen[key]
            if key.startswith("time_"):  # ours is computed once, the official one for every frame
                official = official[:1]
            assert_close(name, ours.reshape(official.shape), official, FLOAT32)
            checked += 1
    assert checked == len(modules) + 3 + len(rms_norms)
    if not case.initial_latents:
        assert_close("flow", flow, tensors["chunk0/step0/flow"], FLOAT32)


@pytest.mark.parametrize("path", fixtures.GRADIENTS, ids=lambda path: path.stem)
def test_gradients(path: Path) -> None:
    """Gradient of one replayed call: through the chunk's own keys and values and the text, not through the prefix."""
    config, recorded = fixtures.read(path)
    case = fixtures.load(fixtures.rollout_of(path))
    case.model.requires_grad_(True)
    chunk, engine = config["chunk"], case.engine
    with case.stream() as stream:
        with torch.no_grad():
            text = case.extend_to(stream, chunk)
        stream.cache.make_room(case.sizes[chunk])
        for step in config["steps"]:
            context = stream.cache.context(stream.frame, case.sizes[chunk], keep=False)
            x = recorded[f"step{step}/input"].clone().requires_grad_()
            steps = engine.steps_of(chunk)
            batch = torch.ones(x.shape[0])
            case.model.zero_grad()
            encoded = case.model.encode_text(text)
            clean = predict(case.model, x, steps.timesteps[step] * batch, steps.sigmas[step] * batch, encoded, context)
            assert_close(f"step{step}/x0", clean, recorded[f"step{step}/x0"], FLOAT32)
            loss = (clean * recorded["loss_weight"]).sum()
            loss.backward()
            assert loss.item() == pytest.approx(recorded[f"step{step}/loss"].item(), rel=1e-4, abs=1e-3)
            gradients = to_official_names({name: parameter.grad for name, parameter in case.model.named_parameters()})
            gradients = {f"step{step}/grad/model.{name}": gradient for name, gradient in gradients.items()}
            gradients[f"step{step}/grad_input"] = x.grad
            official = {name for name in recorded if name.startswith(f"step{step}/grad")}
            assert set(gradients) == official
            for name in sorted(official):
                assert gradients[name] is not None, f"{name}: no gradient"
                assert_close(name, gradients[name], recorded[name], 2e-5 * recorded[name].abs().max().item())
