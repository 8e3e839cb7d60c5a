"""Makes the data of a dry run: a few images as JPEGs, and the first runs of a sweep."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np


def write_images(path: Path, *, train: int = 240, test: int = 40) -> None:
    """Writes an .npz as ``knn_study.data`` reads it: coarse colours, of ten classes."""
    from PIL import Image

    generator = np.random.default_rng(0)
    stored: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        jpegs = []
        for _ in range(count):
            out = io.BytesIO()
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(out, "JPEG")
            jpegs.append(out.getvalue())
        stored[f"{part}_bytes"] = np.frombuffer(b"".join(jpegs), np.uint8)
        stored[f"{part}_offsets"] = np.cumsum([0, *map(len, jpegs)])
        stored[f"{part}_labels"] = np.arange(count) * 10 // count
    np.savez(path, **stored)


def first_lines(sweep: Path, count: int) -> str:
    """The first lines of a sweep that name runs."""
    lines = [line for line in sweep.read_text().splitlines() if line.partition("#")[0].strip()]
    return "\n".join(lines[:count]) + "\n"
