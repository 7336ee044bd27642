"""Whether an image file looks intact, judged by its header and its last bytes."""

import io
from typing import BinaryIO

from xkd_jax.data.pixels import JPEG, MAX_PIXELS, PNG, jpeg_segments

_TAIL = 64  # bytes at the end of a file that contain its end marker
# Baseline, extended and progressive: what every decoder reads.
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
# Bit depths of each colour type.
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def looks_intact(file: BinaryIO) -> bool:
    """Whether the file is complete and of a kind that the decoder reads.

    False says that only decoding can tell: a file of another format, an unusual one or a damaged
    one. Damage in the middle of a file goes unnoticed.

    Args:
      file: at least readable and seekable; only its header and its end are read.

    Raises:
      OSError: it can't be read.
    """
    head = file.read(32)
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    if head.startswith(JPEG):
        return b"\xff\xd9" in tail and _usual_jpeg(file)
    if head.startswith(PNG):
        return b"IEND" in tail and _usual_png(head)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return size >= 8 + int.from_bytes(head[4:8], "little") and _usual_webp(head)
    return False


def _usual_jpeg(file: BinaryIO) -> bool:
    for marker, start, _ in jpeg_segments(file):
        # Start-of-frame markers, without those of Huffman tables, of JPEG-LS and of arithmetic
        # coding's conditioning.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            file.seek(start)
            frame = file.read(6)
            bits, shape, channels = frame[:1], frame[1:5], frame[5:]
            usual = bits == b"\x08" and channels in (b"\x01", b"\x03")
            return marker in _JPEG_FRAMES and usual and all((any(shape[:2]), any(shape[2:])))
    return False


def _usual_png(head: bytes) -> bool:
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    kind = head[12:16] == b"IHDR" and head[24] in _PNG_DEPTHS.get(head[25], ())
    return kind and 0 < width * height <= MAX_PIXELS


def _usual_webp(head: bytes) -> bool:
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[i : i + 3], "little") for i in (24, 27))
        return width * height <= MAX_PIXELS
    return head[12:16] in (b"VP8 ", b"VP8L")
