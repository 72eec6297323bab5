"""benchmarks.questions.photos: each picture is another, and as large and as costly as the first."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from benchmarks.questions import photos


@pytest.mark.parametrize("kind", photos.SIZES)
def test_pixels_of_each_picture_differ_and_sizes_do_not(kind: str) -> None:
    made = [photos.picture(kind, number) for number in (0, 1, len(photos.FREQUENCIES))]
    images = [Image.open(BytesIO(data)) for data in made]
    assert {(image.size, image.format) for image in images} == {(photos.SIZES[kind], photos.codec(kind))}
    pixels = [np.asarray(image) for image in images]
    assert not any(np.array_equal(pixels[one], pixels[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert max(map(len, made)) <= 1.001 * min(map(len, made))


def test_no_two_of_two_hundred_are_the_same_bytes() -> None:
    assert len({photos.picture("1080p JPEG", number) for number in range(200)}) == 200


def test_a_picture_weighs_what_a_photograph_does() -> None:
    """Bits per pixel: JPEGs of this quality have one to three, PNGs of photographs ten to twenty."""
    for kind, (width, height) in photos.SIZES.items():
        bits = 8 * len(photos.picture(kind, 0)) / (width * height)
        assert (1 if photos.codec(kind) == "JPEG" else 10) < bits < (3 if photos.codec(kind) == "JPEG" else 20), kind
