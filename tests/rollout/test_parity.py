"""Our generator against recorded outputs of the official ones: every file of the fixtures directory, every setting from its metadata.

Tolerances: float32 2e-5 absolute (values are O(1), up to 7), gradients 2e-5 of the tensor's largest element, bfloat16 6e-2 absolute with
the recorded x0 fed back at each step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from arcopo_kernels.qk_norm_rope import reference
from support import fixtures
from torch import Tensor

from arcopo_fast.model.checkpoints import to_official_names
from arcopo_fast.rollout.engine import Stream
from arcopo_fast.rollout.sampler import Kernel, next_input, predict
from arcopo_fast.rollout.scheduler import Schedule

FLOAT32, BFLOAT16 = 2e-5, 6e-2


def names(paths: list[Path]) -> dict[str, object]:
    return {"argvalues": paths, "ids": [path.stem for path in paths]}


def assert_close(name: str, ours: Tensor, official: Tensor, tolerance: float) -> None:
    assert ours.shape == official.shape, f"{name}: {tuple(ours.shape)} against {tuple(official.shape)}"
    error = (ours.double() - official.double()).abs().max().item()
    assert error <= tolerance, f"{name} differs by {error:.2e}, tolerance {tolerance:.0e}"


def cached(case: fixtures.Case, stream: Stream, frames: int | None) -> tuple[Tensor, Tensor]:
    """Visible keys and values [layers, B, tokens, H, D], the newest `frames` or all."""
    start = 0 if frames is None else stream.cache.frames - frames
    pool = case.engine.pool
    rows = [[pool.runs([table], start) for table in stream.cache.tables]] * case.model.config.num_layers
    read = [[[pool.read(layer, run) for run in runs] for runs in row] for layer, row in enumerate(rows)]
    both = [torch.stack([torch.cat([torch.cat([run[which] for run in runs], dim=1) for runs in row]) for row in read]) for which in (0, 1)]
    return both[0], both[1]


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


@pytest.fixture(scope="module", params=fixtures.ROLLOUTS, ids=[path.stem for path in fixtures.ROLLOUTS])
def case(request: pytest.FixtureRequest) -> fixtures.Case:
    return fixtures.load(request.param)


def test_there_are_fixtures() -> None:
    assert fixtures.ROLLOUTS, f"{fixtures.DIRECTORY} holds no fixture"


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
    stream = case.engine.start(case.text())
    pending = sorted(case.switches.items())
    window = config["local"] != -1

    def check_cache(name: str, frames: int) -> None:
        key, value = cached(case, stream, None if window else frames)
        if config["repo"] == "ir":  # the first frame of the video is cached roped at position 0 there; ours is roped at every read
            tokens = config["frame_seqlen"]
            key[:, :, :tokens] = rope_at_zero(key[:, :, :tokens], config["h"] // 2, config["w"] // 2)
        assert_close(f"{name}k", key, tensors[f"{name}k"], FLOAT32)
        assert_close(f"{name}v", value, tensors[f"{name}v"], FLOAT32)

    with torch.no_grad():
        for index, latents in enumerate(case.initial_latents):
            case.engine.append(stream, latents)
            check_cache(f"init{index}/", latents.shape[1])
        for chunk, size in enumerate(case.sizes):
            if pending and stream.frame >= pending[0][0]:
                case.engine.switch_prompt(stream, pending.pop(0)[1])
                check_cache(f"chunk{chunk}/recache_", 0)
            trajectory = case.engine.extend(stream, chunk, case.noise.initial(chunk), case.noise, last=False)
            for step, prediction in enumerate(trajectory.predictions):
                assert_close(f"chunk{chunk}/step{step}/x0", prediction, tensors[f"chunk{chunk}/step{step}/x0"], FLOAT32)
            check_cache(f"chunk{chunk}/", size)
    assert_close("latents", torch.cat(stream.latents, dim=1), tensors["latents"], FLOAT32)
    stream.cache.release()
    assert case.engine.pool.pages_in_use == 0


def test_generate(case: fixtures.Case) -> None:
    """The public call gives the official latents, although it skips the clean pass after the last chunk."""
    if case.config["dtype"] != "float32":
        pytest.skip("bfloat16 results are fed back step by step: see test_each_step")
    latents = case.engine.generate(case.text(), case.noise, initial_latents=case.initial_latents, switches=case.switches)
    assert_close("latents", latents, case.tensors["latents"], FLOAT32)
    assert case.engine.pool.pages_in_use == 0


def test_each_step(case: fixtures.Case) -> None:
    """Each prediction from the recorded previous one: errors do not add up, so that bfloat16 can be judged."""
    if case.switches:
        pytest.skip("prompt switches are checked by the whole rollout")
    tensors, tolerance = case.tensors, FLOAT32 if case.config["dtype"] == "float32" else BFLOAT16
    stream = case.engine.start(case.text())
    with torch.no_grad():
        for latents in case.initial_latents:
            case.engine.append(stream, latents)
        for chunk, size in enumerate(case.sizes):
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
                    x = next_input(Kernel(), x, recorded.float(), sigma, following, case.noise.renoise(chunk, step))
                    x = x.to(recorded.dtype)
            case.engine.append(stream, recorded.float(), timestep=case.config["context_noise"])
    stream.cache.release()


def test_module_outputs(case: fixtures.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first network call, module by module: says where a difference begins."""
    if not any(name.startswith("trace/") for name in case.tensors):
        pytest.skip("this fixture has no trace")
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


@pytest.mark.parametrize("path", **names(fixtures.GRADIENTS))
def test_gradients(path: Path) -> None:
    """Gradient of one replayed call: through the chunk's own keys and values and the text, not through the prefix."""
    config, recorded = fixtures.read(path)
    case = fixtures.load(path.with_name(path.name.replace(".grad.", ".")))
    case.model.requires_grad_(True)
    chunk, engine = config["chunk"], case.engine
    stream = engine.start(case.text())
    with torch.no_grad():
        for latents in case.initial_latents:
            engine.append(stream, latents)
        for index in range(chunk):
            engine.extend(stream, index, case.noise.initial(index), case.noise, last=False)
    stream.cache.make_room(case.sizes[chunk])
    for step in config["steps"]:
        context = stream.cache.context(stream.frame, case.sizes[chunk], keep=False)
        x = recorded[f"step{step}/input"].clone().requires_grad_()
        steps = engine.steps_of(chunk)
        batch = torch.ones(x.shape[0])
        case.model.zero_grad()
        clean = predict(
            case.model, x, steps.timesteps[step] * batch, steps.sigmas[step] * batch, case.model.encode_text(case.text()), context
        )
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
    stream.cache.release()
