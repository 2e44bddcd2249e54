"""The streaming decoder against the official VAE's recorded outputs and diffusers' own decode; caches as values; loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanResample, unpatchify
from safetensors.torch import save_file
from support import fixtures
from support.measure import LiveBytes
from support.models import decode_video
from torch import Tensor, nn

from arcopo_fast.errors import UserError
from arcopo_fast.model import vae as vae_module
from arcopo_fast.model.vae import StreamingDecoder, VAECache, channels_last, encode, fork, load_vae
from arcopo_fast.rollout.decode import decode_branches

TOLERANCE = 2e-5

STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 2.0, 1.1]}
TINY = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, **STATISTICS}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan2.1": TINY | {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    "wan2.2": TINY
    # the temporal upsampler stands where the width halves: only there the shortcut of a first frame differs
    | {"dim_mult": [1, 1, 2, 2], "temperal_downsample": [True, False, False], "is_residual": True, "decoder_base_dim": 8}
    | {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 2, "scale_factor_spatial": 16},
}
VARIANTS = CONFIGS | {
    "still": TINY
    | {"dim_mult": [1, 2], "temperal_downsample": [False], "num_res_blocks": 2, "scale_factor_temporal": 1}
    # five channels: no multiple of anything
    | {"base_dim": 5, "scale_factor_spatial": 2},
    "wan2.1 in patches": CONFIGS["wan2.1"] | {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 8},
    # the toy's: an upsampler where the width stays, and one where it grows
    "wan2.2, growing": CONFIGS["wan2.2"]
    | {"dim_mult": [1, 2, 1, 1], "temperal_downsample": [False, True, True], "num_res_blocks": 2, "scale_factor_temporal": 4},
}


def build(name: str) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(**VARIANTS[name]).eval().requires_grad_(False)
    for parameter_name, parameter in vae.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
        if parameter_name.endswith("gamma"):
            nn.init.normal_(parameter, mean=1, std=0.3)
    vae.decoder.conv_out.weight *= 4  # so that some pixels lie outside [-1, 1]
    return vae


@pytest.fixture(params=CONFIGS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return build(request.param)


def latents_of(frames: int, batch: int = 1, size: tuple[int, int] = (3, 2)) -> Tensor:
    return torch.randn(batch, frames, 4, *size)


def diffusers_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """What diffusers' own decoder makes of normalised latents, frame by frame and before the clamp."""
    mean, std = (torch.tensor(vae.config[name], dtype=vae.dtype).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    z = vae.post_quant_conv(latents.transpose(1, 2).to(vae.dtype) * std + mean)
    features: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    frames = [vae.decoder(part, features, feat_idx=[0], first_chunk=not index) for index, part in enumerate(z.split(1, dim=2))]
    return unpatchify(torch.cat(frames, dim=2), patch_size=vae.config["patch_size"] or 1).transpose(1, 2)


def stream(decoder: StreamingDecoder, latents: Tensor, chunks: list[int], cache: VAECache | None = None) -> tuple[Tensor, VAECache]:
    cache = decoder.start() if cache is None else cache
    frames = []
    for chunk in latents.split(chunks, dim=1):
        decoded, cache = decoder.decode_unclamped(chunk, cache)
        frames.append(decoded)
    return torch.cat(frames, dim=1), cache


def snapshot(cache: VAECache) -> dict[nn.Module, tuple[object, ...]]:
    return {conv: (x.data_ptr(), x._version, x.stride(), x.clone()) for conv, x in cache.features.items()}


def assert_unchanged(cache: VAECache, before: dict[nn.Module, tuple[object, ...]]) -> None:
    assert cache.features.keys() == before.keys()
    for conv, (*identity, value) in snapshot(cache).items():
        *former_identity, former = before[conv]
        assert identity == former_identity
        assert isinstance(value, Tensor) and isinstance(former, Tensor) and torch.equal(value, former)


# Against the official code


@pytest.mark.parametrize("path", fixtures.VAES, ids=lambda path: path.stem)
def test_official_outputs(path: Path, tmp_path: Path) -> None:
    config, tensors = fixtures.read(path)
    if "dec_dim" in config:
        pytest.skip(f"{path.name} is of Wan 2.2's VAE, which is read in diffusers' form only")
    weights = {name.removeprefix("w/"): tensor for name, tensor in tensors.items() if name.startswith("w/")}
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    vae = load_vae(tmp_path / "Wan2.1_VAE.pth")
    assert (vae.config["base_dim"], vae.config["z_dim"]) == (config["dim"], config["z_dim"])

    def check(name: str, ours: Tensor) -> None:
        official = tensors[name].transpose(1, 2)
        assert ours.shape == official.shape
        error = (ours - official).abs().max().item()
        assert error <= TOLERANCE, f"{name} differs by {error:.1e}"

    latents = tensors["latent"].transpose(1, 2)
    decoder = StreamingDecoder(vae)
    check("pixels", decoder.decode_unclamped(latents, decoder.start())[0])
    check("pixels_stream", stream(decoder, latents, config["chunks"])[0])
    check("encode_mu", encode(vae, tensors["encode_in"].transpose(1, 2) * 0.5 + 0.5))


# Against diffusers


def test_whole_clip_is_diffusers_decode(vae: AutoencoderKLWan) -> None:
    latents = latents_of(4, batch=2)
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2) * 0.5 + 0.5
    frames = decode_video(vae, latents)
    factor, size = vae.config["scale_factor_temporal"], vae.config["scale_factor_spatial"]
    assert frames.shape == expected.shape == (2, 1 + 3 * factor, 3, 3 * size, 2 * size)
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1
    torch.testing.assert_close(frames, expected, rtol=0, atol=3e-5)
    decoder = StreamingDecoder(vae)
    unclamped, _ = decoder.decode_unclamped(latents, decoder.start())
    assert unclamped.abs().max() > 1  # else the clamp was not tested
    assert torch.equal(decode_video(vae, latents), unclamped.clamp(-1, 1) * 0.5 + 0.5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_network_is_diffusers_network(name: str, dtype: torch.dtype, tolerance: float) -> None:
    vae = nn.Module.to(build(name), dtype)
    for module in vae.decoder.modules():
        if isinstance(module, WanResample):
            module.resample[0] = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")  # diffusers' own rounds to float32
    for frames, batch, size in ((1, 12, (3, 2)), (4, 12, (1, 2)), (3, 1, (3, 5)), (2, 2, (1, 1))):
        latents = latents_of(frames, batch, size).to(dtype)
        expected = diffusers_decode(vae, latents)
        for memory_format in (lambda x: x, channels_last):
            decoder = StreamingDecoder(memory_format(vae))
            decoded, _ = decoder.decode_unclamped(latents, decoder.start())
            assert decoded.dtype == dtype and decoded.shape == expected.shape
            error = ((decoded - expected).abs().max() / expected.abs().max()).item()
            assert error <= tolerance, f"{frames} frames, batch {batch}, {size}: {error:.1e} of the largest pixel"


def test_a_dead_pixel_stays_finite(vae: AutoencoderKLWan) -> None:
    """All channels 0: the norm divides by its floor."""
    for parameter_name, parameter in vae.named_parameters():
        if parameter_name.startswith("decoder.conv_in") or parameter_name.endswith("bias"):
            parameter.zero_()
    decoder, latents = StreamingDecoder(vae), latents_of(2)
    decoded, _ = decoder.decode_unclamped(latents, decoder.start())
    torch.testing.assert_close(decoded, diffusers_decode(vae, latents), rtol=0, atol=1e-6)


def test_decoding_changes_no_parameter_and_no_input(vae: AutoencoderKLWan) -> None:
    before = {name: (parameter.data_ptr(), parameter._version, parameter.stride()) for name, parameter in vae.named_parameters()}
    values = {name: parameter.clone() for name, parameter in vae.state_dict().items()}
    latents = latents_of(3)
    kept = latents.clone()
    decode_video(vae, latents)
    assert before == {name: (parameter.data_ptr(), parameter._version, parameter.stride()) for name, parameter in vae.named_parameters()}
    assert vae.state_dict().keys() == values.keys()
    assert all(torch.equal(parameter, values[name]) for name, parameter in vae.state_dict().items())
    assert torch.equal(latents, kept)


def test_encode_is_diffusers_encode() -> None:
    vae = build("wan2.1")
    frames = torch.rand(2, 9, 3, 12, 8)
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = ((vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mean - mean) / std).transpose(1, 2)
    latents = encode(vae, frames)
    assert latents.shape == (2, 3, 4, 3, 2)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"4 n \+ 1"):
        encode(vae, frames[:, :8])


# Streaming and forks


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1, 1, 1], [3, 3, 1], [1, 3, 3], [2, 5]], ids=str)
def test_chunks_do_not_matter(vae: AutoencoderKLWan, chunks: list[int]) -> None:
    decoder, latents = StreamingDecoder(vae), latents_of(7)
    whole, whole_cache = decoder.decode_unclamped(latents, decoder.start())
    cut, cut_cache = stream(decoder, latents, chunks)
    assert torch.equal(whole, cut)
    assert cut_cache.frames == whole_cache.frames == 7
    convolutions = {module for module in vae.decoder.modules() if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3}
    assert cut_cache.features.keys() == whole_cache.features.keys() == convolutions
    for conv, feature in cut_cache.features.items():
        assert torch.equal(feature, whole_cache.features[conv])
        assert feature.shape[:2] == (1, 2)
        assert feature.untyped_storage().nbytes() == feature.nbytes, "the history keeps more than itself in memory"


@pytest.mark.parametrize("chunks", [[7], [1, 6], [3, 3, 1]], ids=str)
def test_several_frames_in_one_call_are_the_same_video(vae: AutoencoderKLWan, chunks: list[int]) -> None:
    vae, latents = vae.double(), latents_of(7, batch=2).double()
    expected, _ = stream(StreamingDecoder(vae), latents, [7])
    for frames_per_call in (2, 3, 7):
        decoded, cache = stream(StreamingDecoder(vae, frames_per_call), latents, chunks)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)
        assert cache.frames == 7


@pytest.mark.parametrize("prefix_chunks", [[1], [2], [3], [1, 3]], ids=str)
def test_forked_branches_are_independent_videos(vae: AutoencoderKLWan, prefix_chunks: list[int]) -> None:
    decoder = StreamingDecoder(vae)
    prefix, branches = latents_of(sum(prefix_chunks)), latents_of(6, batch=3)
    _, parent = stream(decoder, prefix, prefix_chunks)
    before = snapshot(parent)
    forked = fork(parent, 3)
    assert forked.batch == 3 and forked.features.keys() == parent.features.keys()
    for conv, feature in forked.features.items():
        assert feature.shape[0] == 3 and feature.data_ptr() == parent.features[conv].data_ptr()
    forked_before = snapshot(forked)
    together, _ = stream(decoder, branches, [3, 3], forked)
    assert_unchanged(forked, forked_before)
    assert_unchanged(parent, before)
    for branch, frames in zip(branches.split(1), together.split(1), strict=True):
        alone, _ = decoder.decode_unclamped(torch.cat([prefix, branch], dim=1), decoder.start())
        # Other shapes round differently: 3e-6 of the largest value in the worst of 180 draws.
        torch.testing.assert_close(frames, alone[:, -frames.shape[1] :], rtol=0, atol=1e-5 * alone.abs().max().item())
    again, _ = stream(decoder, branches, [3, 3], fork(parent, 3))
    assert torch.equal(again, together)
    assert (together[0] - together[1]).abs().max() > 1e-2
    other, _ = stream(decoder, branches, [3, 3], fork(stream(decoder, latents_of(sum(prefix_chunks)), prefix_chunks)[1], 3))
    assert (other[:, 0] - together[:, 0]).abs().max() > 1e-3  # the cache carries the prefix


def test_fork_before_the_first_frame() -> None:
    decoder = StreamingDecoder(build("wan2.1"))
    latents = latents_of(2, batch=3)
    assert torch.equal(decoder.decode(latents, fork(decoder.start(), 3))[0], decoder.decode(latents, decoder.start())[0])


@pytest.mark.parametrize("pivot", [0, 1, 2])
def test_a_group_in_slices_is_the_same_group(vae: AutoencoderKLWan, pivot: int) -> None:
    decoder = StreamingDecoder(vae)
    latents = [latents_of(frames, batch=1 if chunk < pivot else 3) for chunk, frames in enumerate((2, 1, 2))]
    whole = [torch.cat([chunk[min(branch, len(chunk) - 1)] for chunk in latents]).unsqueeze(0) for branch in range(3)]
    tails = torch.cat(latents[pivot:], dim=1)
    prefix = torch.cat(latents[:pivot], dim=1) if pivot else tails[:1, :0]
    expected = torch.cat([decode_video(vae, video) for video in whole])
    assert (expected[0] - expected[1]).abs().max() > 3e-4  # ten times what is allowed below
    for branches_at_once in (None, 1, 2, 5):
        frames = torch.cat(list(decode_branches(decoder, prefix, tails, branches_at_once)))
        torch.testing.assert_close(frames, expected, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match="branches_at_once is 0"):
        next(decode_branches(decoder, prefix, tails, branches_at_once=0))


@pytest.mark.parametrize("frames_per_call", [1, 3])
def test_a_window_is_a_slice_of_the_whole_video(frames_per_call: int) -> None:
    """With what lies before it decoded first and dropped: all of it, or as many frames as Wan 2.1's decoder looks back, 38."""
    sizes = TINY | {"base_dim": 2, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "num_res_blocks": 2}
    vae = AutoencoderKLWan(**sizes).double().eval().requires_grad_(False)
    decoder = StreamingDecoder(vae, frames_per_call)
    prefix, tails = (torch.randn(batch, frames, 4, 1, 1).double() for batch, frames in ((1, 42), (2, 2)))
    before, seen = 2, 2 + tails.shape[1]
    whole = torch.cat(list(decode_branches(decoder, prefix, tails)))
    assert whole.shape[1] == 1 + 4 * 43
    errors = []
    for warmup in (40, 38, 4):
        frames = torch.cat(list(decode_branches(decoder, prefix[:, 42 - before - warmup :], tails, 1, warmup=warmup)))
        assert frames.shape[1] == 4 * seen and torch.equal(frames[0, : 4 * before], frames[1, : 4 * before])
        errors.append((frames - whole[:, -4 * seen :]).abs().max().item())
    assert errors[0] <= 1e-13 and errors[1] <= 1e-13 and errors[2] > 1e-6, errors
    assert decoder.factor == 4


def test_what_is_dropped_takes_no_memory() -> None:
    """The peak of a group's decoding is that of its window, however long the warm-up is; without one it grows with the video."""
    vae, tails = build("wan2.1"), torch.randn(2, 1, 4, 4, 4)
    decoder = StreamingDecoder(vae)

    def peak(frames: int, warmup: int) -> int:
        prefix = torch.randn(1, frames, 4, 4, 4)
        with LiveBytes([*vae.parameters(), prefix, tails]) as live:
            for branches in decode_branches(decoder, prefix, tails, warmup=warmup):
                assert branches.shape[1] == decoder.factor * (frames - warmup + 1) - (0 if warmup else decoder.factor - 1)
        return live.peak

    assert peak(4, 3) == peak(8, 7) < peak(8, 0)


def test_decoding_carries_no_gradient() -> None:
    vae = build("wan2.1").requires_grad_()
    decoder = StreamingDecoder(vae)
    frames, cache = decoder.decode(latents_of(2).requires_grad_(), decoder.start())
    assert not frames.requires_grad and not any(feature.requires_grad for feature in cache.features.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_no_worse_than_diffusers_in_bfloat16(name: str) -> None:
    exact, latents = build(name), latents_of(3, batch=2, size=(5, 4))
    vae = AutoencoderKLWan(**VARIANTS[name]).eval().requires_grad_(False)
    vae.load_state_dict(exact.state_dict())
    vae = nn.Module.to(vae, torch.bfloat16)
    expected = diffusers_decode(exact, latents)
    decoder = StreamingDecoder(channels_last(vae))
    decoded, _ = decoder.decode_unclamped(latents, decoder.start())
    assert decoded.dtype == torch.float32
    ours, theirs = ((frames.float() - expected).square().mean().sqrt() for frames in (decoded, diffusers_decode(vae, latents)))
    assert ours <= 1.5 * theirs, f"RMS error {ours:.1e}, diffusers' {theirs:.1e}"
    assert ours <= 0.03 * expected.square().mean().sqrt()


def test_half_precision_vae_gives_float32_frames() -> None:
    vae = build("wan2.1").to(torch.bfloat16)
    frames = decode_video(vae, latents_of(2))
    assert frames.dtype == torch.float32 and frames.isfinite().all()
    assert encode(vae, torch.rand(1, 5, 3, 12, 8)).dtype == torch.float32


def test_wrong_shapes_are_named() -> None:
    decoder = StreamingDecoder(build("wan2.1"))
    for shape in ((1, 2, 5, 3, 2), (2, 4, 3, 2), (1, 0, 4, 3, 2)):
        with pytest.raises(ValueError, match=r"expected \[B, F >= 1, 4, h, w\]"):
            decoder.decode(torch.randn(shape), decoder.start())
    _, cache = decoder.decode(latents_of(1), decoder.start())
    with pytest.raises(ValueError, match="fork"):
        decoder.decode(latents_of(1, batch=2), cache)
    with pytest.raises(ValueError, match="batch 2"):
        fork(decoder.decode(latents_of(1, batch=2), decoder.start())[1], 3)


# Loading


def test_diffusers_is_needed_only_where_a_vae_is_loaded(tmp_path: Path) -> None:
    script = """if True:
        import sys
        sys.modules["diffusers"] = None  # every import of it fails
        from arcopo_fast.errors import UserError
        from arcopo_fast.model import vae
        import arcopo_fast.rollout.decode
        try:
            vae.load_vae(sys.argv[1])
        except UserError as error:
            assert "pip install diffusers" in str(error), error
            print("said so")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.stdout == "said so\n", done.stderr


def test_load_from_a_diffusers_directory(vae: AutoencoderKLWan, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    latents = latents_of(2)
    for path in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline"):
        loaded = load_vae(path)
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(decode_video(loaded, latents), decode_video(vae, latents))
    assert load_vae(tmp_path / "pipeline", dtype=torch.bfloat16).dtype == torch.bfloat16


SIZES = {
    "wan2.1": {},
    "other": {"dim_mult": [1, 3], "num_res_blocks": 1, "temperal_downsample": [True], "decoder_base_dim": 6, "scale_factor_temporal": 2},
    "patches": {"in_channels": 12, "out_channels": 12, "patch_size": 2, "temperal_downsample": [True, False, True]},
}


@pytest.mark.parametrize("kind", SIZES)
def test_sizes_are_read_off_a_file_with_diffusers_names(kind: str, tmp_path: Path) -> None:
    vae = AutoencoderKLWan(**{"base_dim": 4, **SIZES[kind]})
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_file({f"model.{name}": tensor for name, tensor in vae.state_dict().items()}, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    for name in ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "in_channels", "out_channels", "patch_size"):
        assert loaded.config[name] == vae.config[name], name
    expected = vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_bad_vaes_end_in_one_line(tmp_path: Path) -> None:
    def refused(path: Path, *parts: object) -> None:
        with pytest.raises(UserError) as error:
            load_vae(path)
        message = str(error.value)
        assert "\n" not in message
        for part in (path.name, *parts):
            assert str(part) in message, f"{part!r} is not in: {message}"

    def file(name: str, state: dict[str, Tensor]) -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    good = AutoencoderKLWan(base_dim=4).state_dict()
    refused(tmp_path / "none.pth", "does not exist")
    refused(file("resnet.pth", {"conv1.weight": torch.randn(2)}), "conv1.weight", "Wan VAE")
    refused(file("empty.pth", {}), "no tensors")
    refused(file("lacking.pth", {name: tensor for name, tensor in good.items() if "time_conv.bias" not in name}), "time_conv.bias")
    refused(file("no-blocks.pth", {name: tensor for name, tensor in good.items() if "down_blocks" not in name}), "down_blocks")
    refused(file("channels.pth", build("wan2.1").state_dict()), "4 latent channels", "diffusers directory")
    refused(file("residual.pth", build("wan2.2").state_dict()), "Wan2.2")
    refused(file("official.pth", {"decoder.conv1.weight": torch.randn(2)}), "Wan2.1")
    (tmp_path / "directory").mkdir()
    refused(tmp_path / "directory", "config.json")
    (tmp_path / "directory" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(tmp_path / "directory", "AutoencoderKL")
    (tmp_path / "directory" / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "base_dim": 4, "dim_mult": []}')
    save_file(good, tmp_path / "directory" / "diffusion_pytorch_model.safetensors")
    refused(tmp_path / "directory", "configuration")
    (tmp_path / "directory" / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "base_dim": 8}')
    refused(tmp_path / "directory", "instead of")


def test_official_names_are_all_used() -> None:
    _, tensors = fixtures.read(fixtures.files_of(fixtures.OWN).vaes[0])
    official = {name.removeprefix("w/"): tensor for name, tensor in tensors.items() if name.startswith("w/")}
    renamed = vae_module.official_to_diffusers_names(official)
    assert renamed.keys() == AutoencoderKLWan(base_dim=4).state_dict().keys() and len(renamed) == len(official)
