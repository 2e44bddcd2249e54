"""A moving picture of a run's sample videos, the upper row before training and the lower one after it: `docs/toy.gif` is made by it.

python -m arcopo_fast.toy.picture runs/toy docs/toy.gif
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import av
from PIL import Image

from arcopo_fast.storage.atomic import atomic_write

SIDE, GAP = 96, 6
"""Pixels of a video's side in the picture, and between videos."""
COLORS, STRIDE = 64, 2
"""Colors of a frame, and every how many frames one is shown: what keeps the picture below 400 kB."""
PAUSE = 700
"""Milliseconds for which the last frame stands."""


def frames_of(file: Path) -> list[Image.Image]:
    """Return every `STRIDE`th frame of a video, `SIDE` pixels high and wide."""
    with av.open(str(file)) as container:
        return [frame.to_image().resize((SIDE, SIDE), Image.Resampling.BILINEAR) for frame in container.decode(video=0)][::STRIDE]


def moving_picture(rows: list[list[list[Image.Image]]], fps: float) -> bytes:
    """Return a GIF of videos, by row and column, each a list of as many frames."""
    pages = []
    for number in range(len(rows[0][0])):
        page = Image.new("RGB", (len(rows[0]) * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP), "white")
        for row, videos in enumerate(rows):
            for column, video in enumerate(videos):
                page.paste(video[number], (column * (SIDE + GAP), row * (SIDE + GAP)))
        pages.append(page.quantize(COLORS, dither=Image.Dither.NONE))
    file = io.BytesIO()
    durations = [round(1000 * STRIDE / fps)] * (len(pages) - 1) + [PAUSE]
    pages[0].save(file, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0, optimize=True)
    return file.getvalue()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m arcopo_fast.toy.picture", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("picture", type=Path, help="the GIF to write")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (default: 8, the toy world's)")
    options = parser.parse_args()
    videos = json.loads((options.run / "evaluation.json").read_text(encoding="utf-8"))["videos"]
    rows = [[frames_of(options.run / video[when]) for video in videos] for when in ("before", "after")]
    atomic_write(options.picture, moving_picture(rows, options.fps))


if __name__ == "__main__":
    main()
