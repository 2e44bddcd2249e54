"""Frames to files that a person can look at: mp4, and PNG for a strip of frames."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from arcopo_fast.runtime.run_dir import atomic_path, atomic_write

# What plays in a browser first; mpeg4 is in every build of FFmpeg.
CODECS = ("libx264", "libopenh264", "mpeg4")

GAP, BAR = 2, 6
"""Pixels of a sheet: between frames, and of the bar above a marked column."""


def write_mp4(path: str | Path, frames: Tensor | NDArray[Any], fps: float, *, smallest_side: int = 256) -> None:
    """Write a video, atomically.

    Args:
        frames: [F, 3, H, W] in [0, 1]; values outside are clamped.
        fps: frames per second.
        smallest_side: frames with a shorter side are enlarged by a whole factor, each pixel a square, until a person can see them.
    """
    pixels = _enlarged(_pixels(frames), smallest_side)
    height, width = pixels.shape[1:3]
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = cast(av.VideoStream, container.add_stream(_codec(), rate=Fraction(fps).limit_denominator(1000)))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if stream.codec_context.name == "libx264":
            stream.options = {"crf": "16", "preset": "medium"}  # near lossless: the difference of two videos is the point
        else:
            stream.bit_rate = 4_000_000
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_png_sheet(
    path: str | Path,
    frames: Tensor | NDArray[Any],
    *,
    columns: int | None = None,
    smallest_side: int = 128,
    marked: Collection[int] | None = None,
) -> None:
    """Write frames [F, 3, H, W] in [0, 1] as one picture, row by row, `columns` in a row (None: all), `GAP` pixels apart.

    marked: columns, counted from 0, with a dark bar of `BAR` pixels above them, `GAP` above the first row. None: no place for bars.
    """
    pixels = _enlarged(_pixels(frames), smallest_side)
    columns = min(columns or len(pixels), len(pixels))
    rows = math.ceil(len(pixels) / columns)
    height, width = pixels.shape[1:3]
    head = 0 if marked is None else BAR + GAP
    sheet = np.full((head + rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for column in marked or ():
        sheet[:BAR, column * (width + GAP) : column * (width + GAP) + width] = 40
    for index, image in enumerate(pixels):
        top, left = head + index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    _write_png(path, sheet)


def stack_png(path: str | Path, pictures: Sequence[str | Path], *, gap: int = 24) -> None:
    """Write pictures below each other as one, aligned on the left, white between and beside them."""
    images = []
    for picture in pictures:
        with av.open(str(picture)) as container:
            images.append(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    stacked = np.full((sum(len(image) + gap for image in images) - gap, max(image.shape[1] for image in images), 3), 255, dtype=np.uint8)
    top = 0
    for image in images:
        stacked[top : top + len(image), : image.shape[1]] = image
        top += len(image) + gap
    _write_png(path, stacked)


def _write_png(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write [H, W, 3]."""
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = image.shape[1], image.shape[0], "rgb24", Fraction(1)
    packets = [*encoder.encode(av.VideoFrame.from_ndarray(image, format="rgb24")), *encoder.encode(None)]
    atomic_write(path, b"".join(bytes(packet) for packet in packets))


def _codec() -> str:
    return next(name for name in CODECS if name in av.codecs_available and _can_encode(name))


def _can_encode(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False
    return True


def _pixels(frames: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """[F, 3, H, W] in [0, 1] to [F, H, W, 3] bytes."""
    values = frames.detach().float().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames, dtype=np.float32)
    if values.ndim != 4 or values.shape[1] != 3 or not values.size:
        raise ValueError(f"frames have the shape {tuple(values.shape)}; expected [F, 3, H, W] with at least one frame")
    return np.ascontiguousarray(np.rint(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _enlarged(pixels: NDArray[np.uint8], smallest_side: int) -> NDArray[np.uint8]:
    """Repeat pixels by a whole factor; odd sides get one more row or column, because yuv420p halves them."""
    factor = max(1, math.ceil(smallest_side / min(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    odd = [(0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)]
    return np.ascontiguousarray(np.pad(pixels, odd, mode="edge"))
