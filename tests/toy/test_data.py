"""The rendered videos: reproducible, inside the picture, and showing what their captions say."""

from __future__ import annotations

import pytest
import torch

from arcopo_fast.toy import data


def fresh_generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


@pytest.mark.parametrize("latent_frames", [1, 8, 12])
def test_videos_are_bounded_and_a_pure_function_of_the_seed(latent_frames: int) -> None:
    seed = int(torch.randint(2**31, ()))
    frames, captions, scenes = data.sample(5, latent_frames, torch.Generator().manual_seed(seed))
    again, captions_again, scenes_again = data.sample(5, latent_frames, torch.Generator().manual_seed(seed))
    assert frames.shape == (5, 1 + 4 * (latent_frames - 1), 3, 64, 64) and frames.dtype == torch.float32
    assert frames.min() >= 0 and frames.max() <= 1
    assert torch.equal(frames, again) and captions == captions_again and scenes == scenes_again
    other, _, _ = data.sample(5, latent_frames, torch.Generator().manual_seed(seed + 1))
    assert (frames - other).abs().mean() > 0.01


def test_every_combination_has_one_caption() -> None:
    captions = data.all_captions()
    assert len(captions) == len(set(captions)) == 96
    assert captions == data.all_captions()
    for caption in captions:
        shape, color, motion = data.attributes_of(caption)
        assert data.caption_of(shape, color, motion) == caption
    with pytest.raises(ValueError, match="a red circle moving left"):
        data.attributes_of("a red dog moving left")


@pytest.mark.parametrize("flaws", [0.0, 1.0])
@pytest.mark.parametrize("latent_frames", [8, 12])
def test_the_shape_stays_inside_and_follows_its_caption(latent_frames: int, flaws: float) -> None:
    captions = data.all_captions()[:: 4 if latent_frames == 8 else 8]
    captions = [caption.replace(caption.split()[-1], motion) for caption, motion in zip(captions, list(data.MOTIONS) * len(captions))]
    frames, named, scenes = data.sample(len(captions), latent_frames, fresh_generator(), captions=captions, flaws=flaws)
    assert named == captions == [scene.caption for scene in scenes]

    # Independent of the renderer: the shape is where some channel is far above another one.
    saturation = frames.amax(2) - frames.amin(2)  # [N, F, 64, 64]
    saturated = saturation > (0.3 if flaws else 0.4)
    # A tint of the background alone has a saturation of up to 0.34, in 60 draws of all captions.
    border = torch.cat([saturation[..., [0, -1], :].flatten(), saturation[..., :, [0, -1]].flatten()])
    assert border.max() < (0.45 if flaws else 0.4), "touches the border"
    areas = saturated.sum(dim=(2, 3)).float()
    assert (areas > (80 if flaws else 120)).all() and (areas < (600 if flaws else 450)).all()
    x = torch.arange(64) + 0.5
    center = torch.stack([(saturated.sum(2) * x).sum(-1), (saturated.sum(3) * x).sum(-1)], dim=-1) / areas[..., None]
    for video, scene in enumerate(scenes):
        expected = torch.tensor(data.MOTIONS[scene.motion]) * scene.speed * (frames.shape[1] - 1)
        moved = center[video, -1] - center[video, 0]
        assert (moved - expected).abs().max() < (8.0 if flaws else 1.0), scene
        color = frames[video].transpose(0, 1)[:, saturated[video]].mean(1)
        nearest = min(data.COLORS, key=lambda name: float((color - torch.tensor(data.COLORS[name])).norm()))
        assert nearest == scene.color


def test_flaws_change_nothing_but_the_quality() -> None:
    seed = int(torch.randint(2**31, ()))
    clean, captions, scenes = data.sample(4, 8, torch.Generator().manual_seed(seed), flaws=0)
    flawed, captions_again, scenes_again = data.sample(4, 8, torch.Generator().manual_seed(seed))
    assert captions == captions_again and scenes == scenes_again
    assert (clean - flawed).abs().mean() > 0.01
    # Every latent frame has flaws of its own.
    difference = (clean - flawed)[:, ::4].flatten(2)
    assert torch.nn.functional.cosine_similarity(difference[:, 1:], difference[:, :-1], dim=2).mean() < 0.8


def test_the_background_is_dark_varied_and_changes_with_time() -> None:
    frames, _, _ = data.sample(16, 8, fresh_generator())
    border = torch.cat([frames[..., :1, :], frames[..., -1:, :]], dim=-2)  # shapes never reach it
    assert border.amax() < 0.65
    assert border.mean(dim=(1, 2, 3, 4)).std() > 0.02, "videos look alike"
    assert (border[:, -1] - border[:, 0]).abs().mean() > 0.03, "the last chunk is a function of the first"


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        data.sample(2, 60, fresh_generator())
    with pytest.raises(ValueError, match="2 captions"):
        data.sample(2, 8, fresh_generator(), captions=["a red circle moving left"])
