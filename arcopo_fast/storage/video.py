"""Frames to files that a person can look at: mp4, and PNG for a strip of frames."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_path, atomic_write

# What plays in a browser first; mpeg4 is in every build of FFmpeg.
CODECS = ("libx264", "libopenh264", "mpeg4")

NOT_FINITE = "the generator overflows in float16 (use generator.dtype=bfloat16), or its weights or its adapter are damaged or diverged"
"""Why latents or frames are not finite, and what to do."""

GAP, BAR = 2, 6
"""Pixels of a sheet: between frames, and of the bar above a marked column."""


def write_mp4(path: str | Path, frames: Tensor | NDArray[Any], fps: float, *, smallest_side: int = 256) -> None:
    """Write a video, atomically.

    Args:
        frames: [F, 3, H, W] in [0, 1]; values outside are clamped.
        fps: frames per second.
        smallest_side: frames with a shorter side are enlarged by a whole factor, each pixel a square, until a person can see them.

    Raises:
        UserError: a frame holds NaN or infinity; nothing is written.
    """
    pixels = _enlarged(_pixels(frames, path), smallest_side)
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = _add_stream(container, fps, pixels)
        _encode(container, stream, pixels)
        container.mux(stream.encode())


class Mp4Writer:
    """An mp4 that can be watched while its frames are made. A context manager.

    Until the end of the block the file is `<name>.partial.mp4`. Each frame is a fragment of its own, so it holds all frames appended so far
    but the last, whatever becomes of the process. At the end of the block it turns into an ordinary mp4, for there are players that cannot
    seek among fragments, and gets its own name. If the user interrupts the block, it does the former but stays partial; after any other
    error it goes away.

    Args:
        path: where it will lie.
        fps, smallest_side: as for `write_mp4`.

    Attributes:
        partial: where it lies inside the block.
        frames: how many were appended.
    """

    def __init__(self, path: str | Path, fps: float, *, smallest_side: int = 256) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self.frames = 0
        self._fps = fps
        self._smallest_side = smallest_side
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def append(self, frames: Tensor | NDArray[Any]) -> None:
        """Write the next frames, [F, 3, H, W] in [0, 1] as for `write_mp4`; H and W are the same every time."""
        pixels = _enlarged(_pixels(frames, self.path, first=self.frames), self._smallest_side)
        if self._container is None or self._stream is None:
            # FFmpeg 7.1 and later: fragments while it is written, their index rewritten as that of a whole file at the end.
            options = {"movflags": "hybrid_fragmented+frag_every_frame", "flush_packets": "1"}
            self._container = av.open(str(self.partial), "w", format="mp4", options=options)
            self._stream = _add_stream(self._container, self._fps, pixels)
        expected, given = (self._stream.height, self._stream.width), pixels.shape[1:3]
        if given != expected:
            raise ValueError(f"frames of {given[0]}x{given[1]} pixels follow frames of {expected[0]}x{expected[1]} in {self.path}")
        _encode(self._container, self._stream, pixels)
        self.frames += len(pixels)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._container is None:
            return
        if error is None:
            try:
                self._end()
            except BaseException:
                self.partial.unlink(missing_ok=True)
                raise
            os.replace(self.partial, self.path)
        else:
            with suppress(Exception):  # the error of the block is the one to hear of, and fragments play without an index
                self._end()
            if not isinstance(error, KeyboardInterrupt):
                self.partial.unlink(missing_ok=True)

    def _end(self) -> None:
        """Write what the encoder holds, then the index."""
        assert self._container is not None and self._stream is not None
        with self._container:
            self._container.mux(self._stream.encode())


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
    pixels = _enlarged(_pixels(frames, path), smallest_side)
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


def _add_stream(container: av.container.OutputContainer, fps: float, pixels: NDArray[np.uint8]) -> av.VideoStream:
    """The video stream of a new file, for frames like `pixels` [F, H, W, 3].

    No frame waits in the encoder for later ones. Against x264's usual settings that takes a quarter of the time, at nearly the same size
    and error, and the same frames always give the same file: its look-ahead over several frames (mbtree) does not.
    """
    stream = cast(av.VideoStream, container.add_stream(_codec(), rate=Fraction(fps).limit_denominator(1000)))
    stream.height, stream.width = pixels.shape[1:3]
    stream.pix_fmt = "yuv420p"
    if stream.codec_context.name == "libx264":
        # Near lossless: the difference of two videos is the point.
        stream.options = {"crf": "16", "preset": "veryfast", "tune": "zerolatency"}
    else:
        stream.bit_rate = 4_000_000
    return stream


def _encode(container: av.container.OutputContainer, stream: av.VideoStream, pixels: NDArray[np.uint8]) -> None:
    for image in pixels:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))


def _codec() -> str:
    return next(name for name in CODECS if name in av.codecs_available and _can_encode(name))


def _can_encode(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False
    return True


def _pixels(frames: Tensor | NDArray[Any], path: str | Path, first: int = 0) -> NDArray[np.uint8]:
    """[F, 3, H, W] in [0, 1] to [F, H, W, 3] bytes; a tensor is rounded where it is, so that only bytes leave a GPU.

    path, first: the file that they are for, and the number of the first of them in it.
    """
    values = torch.as_tensor(frames).detach()
    if values.dim() != 4 or values.shape[1] != 3 or not values.numel():
        raise ValueError(f"frames have the shape {tuple(values.shape)}; expected [F, 3, H, W] with at least one frame")
    values = values.float()
    if odd := [number for number, finite in enumerate(values.isfinite().flatten(1).all(dim=1).tolist(), start=first) if not finite]:
        raise UserError(f"{path}: frame {odd[0]} holds values that are not finite, and cannot be shown; {NOT_FINITE}")
    levels = values.clamp(0, 1).mul(255).round().byte()
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _enlarged(pixels: NDArray[np.uint8], smallest_side: int) -> NDArray[np.uint8]:
    """Repeat pixels by a whole factor; odd sides get one more row or column, because yuv420p halves them."""
    factor = max(1, math.ceil(smallest_side / min(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    odd = [(0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)]
    return np.ascontiguousarray(np.pad(pixels, odd, mode="edge"))
