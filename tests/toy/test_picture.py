"""The moving picture of a run's sample videos."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from arcopo_fast.toy.picture import GAP, PAUSE, SIDE, moving_picture


def test_all_videos_stand_in_all_pages() -> None:
    pixels = torch.randint(256, (2, 3, 4, SIDE, SIDE, 1), dtype=torch.uint8).expand(-1, -1, -1, -1, -1, 3).numpy() // 128 * 255
    rows = [[[Image.fromarray(frame) for frame in video] for video in row] for row in pixels]
    picture = Image.open(io.BytesIO(moving_picture(rows, fps=8)))
    assert picture.size == (3 * (SIDE + GAP) - GAP, 2 * (SIDE + GAP) - GAP) and picture.n_frames == 4
    for number in range(4):
        picture.seek(number)
        assert picture.info["duration"] == (PAUSE if number == 3 else 250)
        page = np.array(picture.convert("RGB"))
        for row in range(2):
            for column in range(3):
                top, left = row * (SIDE + GAP), column * (SIDE + GAP)
                assert np.array_equal(page[top : top + SIDE, left : left + SIDE], pixels[row, column, number])
