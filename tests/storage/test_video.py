"""mp4 and PNG: read back through PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from arcopo_fast.errors import UserError
from arcopo_fast.storage import video
from arcopo_fast.storage.video import BAR, GAP, Mp4Writer, stack_png, write_mp4, write_png_sheet


def read(path: Path) -> tuple[NDArray[np.uint8], float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate is not None
        return frames, float(stream.average_rate)


def smooth_frames(count: int, height: int, width: int) -> torch.Tensor:
    """Random colours that change slowly in space: a codec may smear edges."""
    coarse = torch.rand(count, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)


@pytest.mark.parametrize(("height", "width", "expected"), [(64, 64, (256, 256)), (48, 80, (288, 480)), (300, 301, (300, 302))])
def test_mp4_has_the_frames_size_rate_and_colours(tmp_path: Path, height: int, width: int, expected: tuple[int, int]) -> None:
    frames = smooth_frames(7, height, width)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    decoded, rate = read(tmp_path / "a.mp4")
    assert decoded.shape == (7, *expected, 3) and rate == 8
    factor = expected[0] // height
    centres = decoded[:, factor // 2 : height * factor : factor, factor // 2 : width * factor : factor]
    errors = np.abs(centres / 255 - frames.permute(0, 2, 3, 1).numpy())
    assert errors.mean() < 0.02
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_the_codec_of_every_ffmpeg_build_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "CODECS", ("a codec that does not exist", "mpeg4"))
    frames = smooth_frames(3, 64, 64)
    write_mp4(tmp_path / "a.mp4", frames.numpy(), 12.5)
    decoded, rate = read(tmp_path / "a.mp4")
    assert decoded.shape == (3, 256, 256, 3) and rate == 12.5
    assert np.abs(decoded[:, 2::4, 2::4] / 255 - frames.permute(0, 2, 3, 1).numpy()).mean() < 0.04


def test_values_outside_are_clamped(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 64, 64), value) for value in (-3.0, 4.0)])
    write_mp4(tmp_path / "a.mp4", frames, 1)
    decoded, _ = read(tmp_path / "a.mp4")
    assert decoded[0].max() < 8 and decoded[1].min() > 247


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frame_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    frames = smooth_frames(5, 16, 16).to(dtype)
    frames[3, 1, 2, 2] = value
    for write in (write_mp4, lambda path, frames, fps: write_png_sheet(path, frames)):
        with pytest.raises(UserError, match=r"a\.mp4: frame 3 holds values that are not finite.*generator\.dtype=bfloat16.*adapter"):
            write(tmp_path / "a.mp4", frames, 8)
    with pytest.raises(UserError, match=r"a\.mp4: frame 8 holds"), Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        writer.append(frames[:3])
        writer.append(frames[:2])
        writer.append(frames)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 64, 64\); expected \[F, 3, H, W\]"):
        write_mp4(tmp_path / "a.mp4", torch.rand(5, 64, 64), 8)

    def fails(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video.av.VideoFrame, "from_ndarray", fails)
    with pytest.raises(OSError, match="No space left"):
        write_mp4(tmp_path / "a.mp4", torch.rand(5, 3, 64, 64), 8)
    assert not list(tmp_path.iterdir())


def boxes(path: Path) -> list[bytes]:
    """The types of an mp4's outermost boxes."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        found.append(data[at + 4 : at + 8])
        at += int.from_bytes(data[at : at + 4], "big")
    return found


def test_a_video_can_be_watched_while_it_is_written(tmp_path: Path) -> None:
    frames = smooth_frames(9, 64, 64)
    with Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        for chunk in frames.split([1, 4, 2, 2]):
            writer.append(chunk)
            if writer.frames > 1:  # the last frame's duration is not known before the next one
                assert len(read(writer.partial)[0]) == writer.frames - 1
        assert b"moof" in boxes(writer.partial)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert sorted(set(boxes(tmp_path / "a.mp4"))) == [b"free", b"ftyp", b"mdat", b"moov"], "an ordinary file, no fragments"
    decoded, rate = read(tmp_path / "a.mp4")
    assert decoded.shape == (9, 256, 256, 3) and rate == 8
    assert np.abs(decoded[:, 2::4, 2::4] / 255 - frames.permute(0, 2, 3, 1).numpy()).mean() < 0.02
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].frames == 9 and container.duration == 9 * av.time_base / 8


@pytest.mark.parametrize("codec", video.CODECS)
def test_an_interrupted_video_keeps_what_was_written(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "CODECS", (codec, "mpeg4"))
    frames = smooth_frames(5, 64, 64)
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        writer.append(frames)
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(read(writer.partial)[0]) == 5 and b"moof" not in boxes(writer.partial)
    with Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        writer.append(frames[:2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"] and len(read(tmp_path / "a.mp4")[0]) == 2


def test_a_failed_video_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"an earlier one")
    with pytest.raises(ValueError, match="frames of 256x320 pixels follow frames of 256x256"), Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        writer.append(smooth_frames(3, 64, 64))
        writer.append(smooth_frames(3, 64, 80))
    with Mp4Writer(tmp_path / "a.mp4", 8):
        pass
    monkeypatch.setattr(Mp4Writer, "_end", lambda writer: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"), Mp4Writer(tmp_path / "a.mp4", 8) as writer:
        writer.append(smooth_frames(3, 64, 64))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == b"an earlier one"


def test_png_sheet_holds_every_frame_exactly(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8)
    write_png_sheet(tmp_path / "a.png", frames / 255, columns=3, smallest_side=64)
    (sheet,), _ = read(tmp_path / "a.png")
    assert sheet.shape == (2 * 64 + 2, 3 * 96 + 4, 3)
    for index, frame in enumerate(frames):
        top, left = index // 3 * 66, index % 3 * 98
        tile = sheet[top : top + 64 : 2, left : left + 96 : 2]
        np.testing.assert_array_equal(tile, frame.permute(1, 2, 0).numpy())


def test_png_sheets_mark_columns_and_stack(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (6, 3, 20, 30), dtype=torch.uint8) / 255
    write_png_sheet(tmp_path / "plain.png", frames, columns=3, smallest_side=20)
    write_png_sheet(tmp_path / "marked.png", frames, columns=3, smallest_side=20, marked=[1])
    (plain,), _ = read(tmp_path / "plain.png")
    (marked,), _ = read(tmp_path / "marked.png")
    np.testing.assert_array_equal(marked[BAR + GAP :], plain)
    dark = marked[:BAR].max(axis=-1) < 128
    assert dark[:, 30 + GAP : 60 + GAP].all() and dark.sum() == BAR * 30, "a bar above the second column only"

    write_png_sheet(tmp_path / "narrow.png", frames[:2], smallest_side=20)
    stack_png(tmp_path / "both.png", [tmp_path / "marked.png", tmp_path / "narrow.png"], gap=5)
    (both,), _ = read(tmp_path / "both.png")
    (narrow,), _ = read(tmp_path / "narrow.png")
    np.testing.assert_array_equal(both[: len(marked)], marked)
    np.testing.assert_array_equal(both[len(marked) + 5 :, : narrow.shape[1]], narrow)
    assert (both[len(marked) : len(marked) + 5] == 255).all() and (both[len(marked) :, narrow.shape[1] :] == 255).all()


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    frames = torch.rand(24, 3, 64, 96)
    for name in "ab":
        write_mp4(tmp_path / f"{name}.mp4", frames, 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
