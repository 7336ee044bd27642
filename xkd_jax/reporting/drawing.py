"""Draws the objects that a detector has found on a copy of the picture."""

import colorsys
import functools
import io
import os

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xkd_jax.detection import Detected

_OPACITY = 0.45  # of masks
_GOLDEN = 0.618  # of a turn: the hues of neighbouring classes lie far apart
_LINES = 40  # lines of text that would fit in the shorter side of a large picture
_SMALLEST = 10  # height of the text, pixels
_QUALITY = 95  # of JPEGs


def draw_objects(found: Detected) -> np.ndarray:
    """A copy of a picture with boxes, labels and masks, the most probable objects on top.

    Returns:
      uint8 [h, w, 3].
    """
    drawn = found.pixels.copy()
    order = [*reversed(range(len(found.names)))]
    colours = [_colour(number) for number in found.classes.tolist()]
    for i in order if found.masks is not None else ():
        mask, colour = found.mask(i), np.array(colours[i], np.float32)
        drawn[mask] = np.rint((1 - _OPACITY) * drawn[mask] + _OPACITY * colour)
    image = Image.fromarray(drawn)
    height = max(_SMALLEST, min(image.size) // _LINES)
    draw, font = ImageDraw.Draw(image), _font(height)
    for i in order:
        box, label = found.boxes[i].tolist(), f"{found.names[i]} {100 * found.scores[i]:.0f}%"
        draw.rectangle(box, outline=colours[i], width=max(2, height // 6))
        _, _, right, bottom = draw.textbbox((0, 0), label, font)
        # Above the box, but within the picture.
        x, y = max(0, min(box[0], image.width - right)), max(0, box[1] - bottom)
        draw.rectangle((x, y, x + right, y + bottom), fill=colours[i])
        draw.text((x, y), label, fill="black", font=font)
    return np.asarray(image)


def encode(pixels: np.ndarray, suffix: str) -> bytes:
    """The contents of an image file: a PNG for the suffix ".png", otherwise a JPEG."""
    file = io.BytesIO()
    kind = "PNG" if suffix.lower() == ".png" else "JPEG"
    Image.fromarray(pixels).save(file, kind, quality=_QUALITY)
    return file.getvalue()


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1, 0.7, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    # Matplotlib's covers more alphabets than the one in Pillow.
    path = os.path.join(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, height)
