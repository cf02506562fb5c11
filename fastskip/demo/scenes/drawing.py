"""Scenes as pixels. Whole batches are drawn at once: training draws a fresh batch every step."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastskip.demo.scenes.world import GRID, SHAPES, Scene

IMAGE_SIZE = 64
CELL = IMAGE_SIZE // GRID
NOISE = 8.0
"""Standard deviation of the pixel noise, out of 255."""

RGB = {
    "red": (225, 35, 35),
    "green": (35, 180, 50),
    "blue": (45, 70, 235),
    "yellow": (235, 215, 40),
    "purple": (175, 50, 205),
    "cyan": (50, 210, 220),
}


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 64 x 64 pixels; the same scene gives the same pixels."""
    return Image.fromarray(render([scene])[0])


def render(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """[N, 64, 64, 3]; figure by figure as antialiased coverage, then the noise of each scene."""
    shape = (len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3)
    pixels = np.empty(shape)
    pixels[:] = np.array([scene.background for scene in scenes])[:, None, None, None]
    cells = pixels.reshape(len(scenes), GRID, CELL, GRID, CELL, 3)
    placed = [(number, figure) for number, scene in enumerate(scenes) for figure in scene.figures]
    if placed:
        numbers = np.array([number for number, _ in placed])
        rows = np.array([figure.row for _, figure in placed])
        columns = np.array([figure.column for _, figure in placed])
        rgb = np.array([RGB[figure.colour] for _, figure in placed])[:, None, None]
        cover = _coverage(
            np.array([SHAPES.index(figure.shape) for _, figure in placed]),
            np.array([(figure.shift_x, figure.shift_y, figure.radius) for _, figure in placed]),
        )[..., None]
        below = cells[numbers, rows, :, columns]
        cells[numbers, rows, :, columns] = cover * rgb + (1 - cover) * below
    for number, scene in enumerate(scenes):
        noise = np.random.default_rng(scene.noise_seed).standard_normal(shape[1:], np.float32)
        pixels[number] += NOISE * noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _coverage(shapes: NDArray[np.int64], geometry: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of each pixel of a cell a figure covers: [F], [F, (x, y, radius)] -> [F, 16, 16]."""
    axis = np.arange(CELL) + 0.5 - CELL / 2
    x = axis[None, None, :] - geometry[:, 0, None, None]
    y = axis[None, :, None] - geometry[:, 1, None, None]
    radius = geometry[:, 2, None, None]
    across, along = np.abs(x), np.abs(y)
    distances = {
        "circle": np.hypot(x, y) - radius,
        "square": np.maximum(across, along) - 0.88 * radius,
        # an upright triangle: two slanted edges and the base
        "triangle": np.maximum((2 * across - y - radius) / np.sqrt(5), y - 0.85 * radius),
        "cross": np.minimum(
            np.maximum(across - 0.32 * radius, along - radius),
            np.maximum(across - radius, along - 0.32 * radius),
        ),
    }
    signed = np.stack(
        [np.broadcast_to(distances[name], x.shape[:1] + (CELL, CELL)) for name in SHAPES]
    )
    covered: NDArray[np.float64] = np.clip(0.5 - signed[shapes, np.arange(len(shapes))], 0, 1)
    return covered
