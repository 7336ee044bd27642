"""Image files: their size and orientation from the header, and their uint8 pixels."""

import io
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
# Pillow refuses images of more than 179 million pixels, and PNGs with more than 1 MB of text, as
# possible attacks. The images of a data set are the user's own, and scanners, satellites and
# microscopes do produce larger ones. The limit below applies instead: it still stops a small file
# that would exhaust the memory, and the scan before a run can check it without decoding.
MAX_PIXELS = 2**29
LARGE = 2**26  # pixels above which a reduced image saves enough time and memory
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_ORIENTATION = 0x0112  # EXIF's tag
_PNG_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def measure(image: bytes) -> tuple[int, int, int]:
    """Width, height and orientation, read from the header.

    Returns:
      Width and height in pixels, once the image is upright, and EXIF's orientation (1 to 8), by
      which the stored pixels must be turned.

    Raises:
      Exception: of many types; it is not an image, its header is damaged or it is too large.
    """
    if image.startswith(JPEG):
        turned = jpeg_orientation(image)
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError:  # Pillow reads it or reports what is wrong
            width, height = _open(image).size
    else:
        opened = _open(image)
        turned = 1
        if opened.format == "TIFF":
            # Whether `size` is that of the upright image depends on Pillow's version.
            tags: Any = opened
            width, height, turned = (tags.tag_v2.get(key, 1) for key in (256, 257, _ORIENTATION))
        else:
            width, height = opened.size
            # Pillow decodes a PNG to look for metadata after the pixels.
            if opened.format != "PNG" or any(key in image for key in _PNG_METADATA):
                turned = _pillow_orientation(opened)
    if turned >= 5:
        width, height = height, width
    return int(width), int(height), turned


def decode_pixels(
    image: bytes, orientation: int, reduction: float = 1, fast: bool = False
) -> np.ndarray:
    """Decodes an image file to upright uint8 pixels [h, w, 3].

    Args:
      image: the bytes of the file.
      orientation: from `measure`.
      reduction: from 2, 4 or 8 on, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which is
        cheaper because the detail is never computed. Other large images are reduced by averaging,
        at most by half this factor.
      fast: whether to decode JPEGs a little faster, with slightly less exact pixels.

    Raises:
      Exception: of many types; it can't be decoded.
    """
    if image.startswith(JPEG):
        options: dict[str, Any] = {"fastdct": fast, "fastupsample": fast}
        try:
            if reduction >= 2:
                factor = 2 ** min(3, int(math.log2(reduction)))
                height, width = map(int, simplejpeg.decode_jpeg_header(image)[:2])
                options |= {"min_width": -(-width // factor), "min_height": -(-height // factor)}
            return upright(simplejpeg.decode_jpeg(image, **options), orientation)
        except ValueError:
            pass  # CMYK, or a defect that Pillow tolerates or reports
    with _open(image) as opened:
        opened.load()
        large = opened.width * opened.height > LARGE
        pixels = _to_rgb(opened, int(reduction / 2) if large else 1)
        if opened.format == "TIFF":  # turned by Pillow
            orientation = _pillow_orientation(opened)
        return upright(pixels, orientation)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns stored pixels [h, w, ...] as EXIF's orientation says: 1 to 8, where 1 is upright."""
    if not 2 <= orientation <= 8:
        return pixels
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def jpeg_orientation(image: bytes) -> int:
    """EXIF's orientation of a JPEG, else XMP's; 1 if there is none or its metadata are damaged.

    Pillow's parser gives the same, but takes as long as decoding a small image.
    """
    xmp = 1
    for marker, start, stop in jpeg_segments(io.BytesIO(image)):
        if marker != 0xE1:
            continue
        block = image[start:stop]
        if block.startswith(b"Exif\0\0") and (found := _exif_orientation(block[6:])):
            return found
        if match := re.search(rb'tiff:Orientation(?:="|>)([1-8])', block):
            xmp = int(match[1])
    return xmp


def jpeg_segments(file: Any) -> Iterator[tuple[int, int, int]]:
    """The marker, start and stop of each segment of a JPEG before its pixels.

    Args:
      file: a binary file, whose position may be changed between two segments.
    """
    position = 2
    while True:
        file.seek(position)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xD9, 0xDA):
            return
        if head[1] == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(head[2:], "big")
        yield head[1], position + 4, position + 2 + length
        position += 2 + length


def _exif_orientation(tiff: bytes) -> int:
    """The orientation tag of the first directory, or 0."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 0
    except struct.error:
        pass  # it is cut off
    return 0


def _pillow_orientation(opened: Image.Image) -> int:
    try:
        found = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # of many types; the pixels are intact even if the metadata are not
        return 1
    return found if found in range(1, 9) else 1


def _open(image: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(image))
    width, height = opened.size
    if width * height > MAX_PIXELS and opened.format not in ("JPEG", "MPO"):
        opened.close()
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}")
    return opened


def _to_rgb(opened: Image.Image, factor: int) -> np.ndarray:
    """uint8 [h, w, 3], reduced by an integer factor; the alpha channel is dropped."""
    mode, image = opened.mode, opened
    if mode.startswith("I;16") or (mode == "I" and opened.format == "PPM"):
        image = Image.fromarray(_upper_bits(opened))
    elif mode in ("I", "F"):
        kind = "float" if mode == "F" else "signed or 32-bit integer"
        raise ValueError(f"mode {mode}, {kind} pixels without a range; save it with 8 or 16 bits")
    elif mode == "P" and isinstance(opened.info.get("transparency"), bytes):
        image = opened.convert("RGBA")  # Pillow warns about a direct conversion
    if factor > 1:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB").reduce(factor)
    return np.asarray(image.convert("RGB"))


def _upper_bits(opened: Image.Image) -> np.ndarray:
    """The upper 8 bits of greyscale pixels of 12 or 16 bits, which Pillow clips at 255: [h, w]."""
    tags = getattr(opened, "tag_v2", {})  # TIFF's
    (bits,) = tags.get(258, (16,))
    grey = (np.asarray(opened) >> (bits - 8)).astype(np.uint8)
    return ~grey if tags.get(262) == 0 else grey  # 0: white is zero
