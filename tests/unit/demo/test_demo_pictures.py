"""The pictures, the questions about them and the command that draws."""

import io
import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from serve_app.demo.drawing import COLOURS, SHAPES, Figure, draw, draw_named, random_figures
from tools.demo.examples import KINDS, NUMBERS, Kind, random_example
from tools.demo.measure import held_out


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def command(*names: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "serve_app.demo", "draw", *names], capture_output=True, check=False)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_figure_has_its_colour_in_its_middle_and_its_shapes_area(colour: str, shape: str) -> None:
    pixels = np.asarray(draw([Figure(colour, shape, radius=0.4, angle=0.3)]))
    assert "#" + bytes(pixels[112, 112]).hex() == COLOURS[colour]
    inked = (pixels != 255).any(-1).mean()
    star = 10 / 2 * 0.45 * math.sin(math.pi / 5)
    area = {"circle": math.pi, "square": 2, "triangle": 3 * math.sqrt(3) / 4, "star": star}[shape] * 0.4**2
    assert inked == pytest.approx(area, rel=0.05)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_random_figures_touch_neither_each_other_nor_the_edge(count: int) -> None:
    for seed in range(50):
        figures = random_figures(generator(seed), count)
        assert len(figures) == count
        for index, one in enumerate(figures):
            assert one.radius < min(one.x, one.y, 1 - one.x, 1 - one.y)
            for other in figures[:index]:
                assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


@pytest.mark.parametrize("kind", KINDS)
def test_examples_follow_from_their_seed(kind: Kind) -> None:
    def seen(seed: int) -> tuple[list[bytes], list[tuple[str, str]]]:
        example = random_example(generator(seed), kind)
        return [picture.tobytes() for picture in example.pictures], list(example.turns)

    runs = [seen(seed) for seed in range(20)]
    assert runs == [seen(seed) for seed in range(20)]
    assert len({str(run) for run in runs}) > 10 or kind == "none"


def test_answers_are_those_of_the_figures_drawn() -> None:
    for seed in range(100):
        ((figure,),) = (example := random_example(generator(seed), "one")).figures
        answers = {answer for _, answer in example.turns}
        assert answers == {f"A {figure}.", f"{figure.colour.capitalize()}.", f"A {figure.shape}.", "One."}
        (figures,) = (example := random_example(generator(seed), "count")).figures
        assert f"{NUMBERS[len(figures) - 1]}." in {answer for _, answer in example.turns}


def test_two_pictures_are_never_alike_and_each_is_asked_for() -> None:
    for seed in range(100):
        example = random_example(generator(seed), "two")
        (first,), (second,) = example.figures
        assert str(first) != str(second)
        for question, answer in example.turns:
            place = "first" if (str(first) in question + answer) else "second"
            assert place in question + answer


def test_held_out_questions_differ_and_stay() -> None:
    questions = held_out("one", 20)
    assert all(one[0][0].tobytes() != other[0][0].tobytes() for one, other in pairwise(questions))
    assert [asked[1:] for asked in held_out("one", 20)] == [asked[1:] for asked in questions]


def test_the_command_draws_what_it_is_told() -> None:
    picture = Image.open(io.BytesIO(command("red circle", "blue star").stdout))
    assert picture.tobytes() == draw_named(["red circle", "blue star"]).tobytes()
    colours = {bytes(colour).hex() for colour in np.asarray(picture).reshape(-1, 3)}
    assert {"e02020", "2050d8"} < colours


@pytest.mark.parametrize("names", [["red"], ["red blob"], ["mauve circle"], ["red circle"] * 5])
def test_the_command_says_what_it_cannot_draw(names: list[str]) -> None:
    done = command(*names)
    assert done.returncode == 2 and not done.stdout
    assert b"one to four" in done.stderr or b"is not one of red, orange" in done.stderr
