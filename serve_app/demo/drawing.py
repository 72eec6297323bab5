"""The pictures that the demo model knows: one to four figures on a light ground, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": "#e02020",
    "orange": "#f58a10",
    "yellow": "#f5d90a",
    "green": "#1f9d3a",
    "blue": "#2050d8",
    "purple": "#8a2fc0",
    "pink": "#f58cc0",
    "black": "#202020",
}
SHAPES = ("circle", "square", "triangle", "star")

_STAR = 0.45  # inner radius by outer radius
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Figure:
    """One figure; position and radius (of the circle around it) are fractions of the picture's side."""

    colour: str
    shape: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3
    angle: float = 0.0

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    def outline(self, side: int) -> list[tuple[float, float]]:
        """The corners in pixels of a picture `side` wide; of no use for a circle."""
        corners = {"square": 4, "triangle": 3, "star": 10}[self.shape]
        start = self.angle - math.pi / (4 if self.shape == "square" else 2)
        radii = [self.radius * (_STAR if self.shape == "star" and corner % 2 else 1) for corner in range(corners)]
        angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
        return [
            (side * (self.x + radius * math.cos(angle)), side * (self.y + radius * math.sin(angle)))
            for radius, angle in zip(radii, angles, strict=True)
        ]


def draw(
    figures: Sequence[Figure],
    side: int = 224,
    background: tuple[int, int, int] = (255, 255, 255),
    jitter: np.random.Generator | None = None,
) -> Image.Image:
    """Return the picture, `side` pixels square; with `jitter`, each colour is off by up to 20 of 255 per channel."""
    fine = side * _OVERSAMPLING
    picture = Image.new("RGB", (fine, fine), background)
    canvas = ImageDraw.Draw(picture)
    for figure in figures:
        colour = np.array([int(COLOURS[figure.colour][start : start + 2], 16) for start in (1, 3, 5)])
        if jitter is not None:
            colour = (colour + jitter.integers(-20, 21, 3)).clip(0, 255)
        fill = tuple(map(int, colour))
        if figure.shape == "circle":
            canvas.circle((fine * figure.x, fine * figure.y), fine * figure.radius, fill=fill)
        else:
            canvas.polygon(figure.outline(fine), fill=fill)
    return picture.reduce(_OVERSAMPLING)


def draw_named(names: Sequence[str]) -> Image.Image:
    """Draw one to four figures, each named like "red circle", on white. ValueError where one is not known."""
    if not 1 <= len(names) <= 4:
        raise ValueError("one to four figures")
    figures = []
    for index, name in enumerate(names):
        colour, _, shape = name.partition(" ")
        if colour not in COLOURS or shape not in SHAPES:
            raise ValueError(f'"{name}" is not one of {", ".join(COLOURS)} with one of {", ".join(SHAPES)}')
        where = (
            {} if len(names) == 1 else {"x": 0.27 + 0.46 * (index % 2), "y": 0.27 + 0.46 * (index // 2), "radius": 0.17}
        )
        figures.append(Figure(colour, shape, **where))
    return draw(figures)


def random_figures(random: np.random.Generator, count: int) -> list[Figure]:
    """`count` figures of any colour and shape, nowhere touching each other or the edge."""
    smallest, largest = {1: (0.15, 0.4), 2: (0.11, 0.26)}.get(count, (0.11, 0.2))
    figures: list[Figure] = []
    while len(figures) < count:
        radius = random.uniform(smallest, largest)
        x, y = random.uniform(radius + 0.02, 0.98 - radius, 2)
        if any(math.hypot(x - other.x, y - other.y) < radius + other.radius + 0.03 for other in figures):
            continue
        colour, shape = random.choice(list(COLOURS)), random.choice(SHAPES)
        figures.append(Figure(str(colour), str(shape), x, y, radius, random.uniform(0, 2 * math.pi)))
    return figures


def random_picture(random: np.random.Generator, figures: Sequence[Figure], side: int = 224) -> Image.Image:
    """Draw `figures` on a ground of a random light shade, with jittered colours."""
    shade = int(random.integers(190, 256))
    red, green, blue = (int(channel) for channel in (shade + random.integers(-8, 9, 3)).clip(0, 255))
    return draw(figures, side, (red, green, blue), random)
