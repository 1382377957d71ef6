"""Grids of small pictures, to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def save_grid(pictures: Tensor, path: Path, *, columns: int = 8, zoom: int = 2) -> None:
    """Write `pictures` `[n, 3, h, w]` in [0, 1] as one PNG, row by row."""
    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * height, columns * width)
    for index, picture in enumerate(pictures.float().clamp(0, 1)):
        top, left = index // columns * height, index % columns * width
        sheet[:, top : top + height, left : left + width] = picture
    pixels = (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
