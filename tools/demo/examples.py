"""Questions about drawn pictures, and their answers: what the demo model is trained on and measured by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from serve_app.demo.drawing import Figure, random_figures, random_picture

Kind = Literal["one", "count", "two", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NUMBERS = ("One", "Two", "Three", "Four")
PLACES = ("first", "second")

WHAT = ("What is in this picture?", "What is in this image?", "What do you see?", "Describe this image.")
COLOUR = ("Which colour is it?", "What colour is the figure?")
SHAPE = ("Which shape is it?", "What shape is the figure?")
COUNT = ("How many figures are there?", "How many figures do you see?", "How many?")
WHICH = ("Which picture has the {}?", "Which image shows the {}?", "Where is the {}?")
PLACED = ("What is in the {} picture?", "What is in the {} image?")
ELSE = ("Hello!", "Who are you?", "Tell me a story.", "What is the weather in Paris?", "Say something.", *WHAT)


@dataclass(frozen=True)
class Example:
    """Pictures, the figures in each, and questions with their answers; every question stands alone."""

    pictures: Sequence[Image.Image]
    figures: Sequence[Sequence[Figure]]
    turns: Sequence[tuple[str, str]]


def random_example(random: np.random.Generator, kind: Kind, side: int = 224, most_turns: int = 9) -> Example:
    """An example with one figure, with one to four to count, with two pictures to compare, or without a picture."""
    counts = {"one": [1], "count": [int(random.integers(1, 5))], "two": [1, 1], "none": []}[kind]
    figures = [random_figures(random, count) for count in counts]
    while kind == "two" and str(figures[0][0]) == str(figures[1][0]):
        figures[1] = random_figures(random, 1)
    pictures = [random_picture(random, each, side) for each in figures] if side else []
    turns = _turns(kind, figures)
    chosen = [turns[index] for index in random.permutation(len(turns))[:most_turns]]
    return Example(pictures, figures, [(str(random.choice(questions)), answer) for questions, answer in chosen])


def _turns(kind: Kind, figures: Sequence[Sequence[Figure]]) -> list[tuple[Sequence[str], str]]:
    """For each thing that can be asked: ways to ask it, and the answer."""
    if kind == "none":
        return [(ELSE, "Please show me a picture.")]
    if kind == "two":
        named: list[tuple[Sequence[str], str]] = [
            ([question.format(each[0]) for question in WHICH], f"The {place} picture.")
            for place, each in zip(PLACES, figures, strict=True)
        ]
        return named + [
            ([question.format(place) for question in PLACED], f"A {each[0]}.")
            for place, each in zip(PLACES, figures, strict=True)
        ]
    number = (COUNT, f"{NUMBERS[len(figures[0]) - 1]}.")
    if len(figures[0]) > 1:
        return [number, (WHAT, f"{NUMBERS[len(figures[0]) - 1]} figures.")]
    figure = figures[0][0]
    what = [(WHAT, f"A {figure}."), (COLOUR, f"{figure.colour.capitalize()}."), (SHAPE, f"A {figure.shape}.")]
    return [number] if kind == "count" else [*what, number]
