"""Kinds of image files: orientation, depth, size; the scan before a run and the decoder agree."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.data.test_decode import encode, photo
from xkd_jax import data
from xkd_jax.data import pixels
from xkd_jax.data.decode import DamagedImage, decode, decode_crop, eval_crop, image_size
from xkd_jax.data.intact import looks_intact

FORMATS = ("jpeg", "png", "webp", "tiff")


def whole_crop(image: bytes, size: int) -> np.ndarray:
    return decode_crop(image, np.random.default_rng(0), size, (1, 1), (1, 1))


# ---- orientation


def turned(format: str, orientation: int, mode: str = "RGB", **options) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encode(photo(60, 40).convert(mode), format, exif=exif, **options)


def expected(encoded: bytes) -> Image.Image:
    """By Pillow's own `exif_transpose`."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format, orientation):
    encoded = turned(format, orientation)
    upright = expected(encoded)
    np.testing.assert_array_equal(decode(encoded), np.asarray(upright))
    assert image_size(encoded) == upright.size == ((60, 40) if orientation < 5 else (40, 60))
    crop = eval_crop(encoded, 32).astype(int)
    np.testing.assert_allclose(crop, eval_crop(np.asarray(upright), 32), atol=1)
    got, wanted = (
        decode_crop(image, np.random.default_rng(1), 24).astype(int)
        for image in (encoded, np.asarray(upright))
    )
    assert np.abs(got - wanted).mean() < 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_orientation_of_other_jpegs(mode):
    encoded = turned("jpeg", 6, mode)
    np.testing.assert_allclose(decode(encoded).astype(int), np.asarray(expected(encoded)), atol=1)


def test_orientation_of_a_jpeg_that_is_decoded_at_half_its_size():
    exif = Image.Exif()
    exif[274] = 8
    encoded = encode(photo(640, 480), "jpeg", exif=exif, quality=95)
    wanted = eval_crop(np.asarray(expected(encoded)), 64).astype(int)
    assert np.abs(eval_crop(encoded, 64) - wanted).mean() < 2


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_orientation_of_the_first_page(compression):
    pages = [photo(60, 40), photo(30, 30)]
    options = {"compression": compression, "tiffinfo": {274: 6}, "append_images": pages[1:]}
    encoded = encode(pages[0], "tiff", save_all=True, **options)
    assert decode(encoded).shape == (60, 40, 3)
    assert image_size(encoded) == (40, 60)
    np.testing.assert_array_equal(decode(encoded), np.rot90(np.asarray(pages[0]), -1))


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_both_byte_orders(order):
    plain = encode(photo(60, 40))
    tiff = struct.pack(order + "2sHIHHHIHH", b"II" if order == "<" else b"MM", 42, 8, 1,
                       274, 3, 1, 6, 0)  # fmt: skip
    assert decode(with_segment(plain, b"Exif\0\0" + tiff)).shape == (60, 40, 3)
    for damaged in (tiff[:15], tiff[:4] + b"\xff" * 4, b"XX" + tiff[2:], b""):
        assert decode(with_segment(plain, b"Exif\0\0" + damaged)).shape == (40, 60, 3)


@pytest.mark.parametrize("text", ['tiff:Orientation="6"', "<tiff:Orientation>6<"])
def test_orientation_in_xmp(text):
    plain = encode(photo(60, 40))
    block = b"http://ns.adobe.com/xap/1.0/\0" + text.encode()
    encoded = with_segment(plain, block)
    np.testing.assert_array_equal(decode(encoded), np.rot90(decode(plain), -1))
    assert image_size(encoded) == expected(encoded).size


def with_segment(jpeg: bytes, block: bytes) -> bytes:
    """The JPEG with one more APP1 segment, after a fill byte."""
    return jpeg[:2] + b"\xff\xff\xe1" + struct.pack(">H", 2 + len(block)) + block + jpeg[2:]


def test_a_png_whose_metadata_are_damaged():
    encoded = encode(photo(60, 40), "png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(encoded).shape == (40, 60, 3)
    assert image_size(encoded) == (60, 40)


# ---- 16 bits and float


RAMP = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)


def ramp(format: str, dtype: str = "<u2", **options) -> bytes:
    return encode(Image.fromarray(RAMP.astype(dtype)), format, **options)


@pytest.mark.parametrize(
    "encoded",
    [
        ramp("png"),
        ramp("tiff"),
        ramp("tiff", ">u2"),
        ramp("tiff", compression="tiff_lzw"),
        ramp("ppm"),
    ],
)
def test_sixteen_bits_are_reduced_to_the_upper_eight(encoded):
    wanted = np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decode(encoded), wanted)
    np.testing.assert_array_equal(eval_crop(encoded, 224), eval_crop(wanted, 224))
    np.testing.assert_array_equal(whole_crop(encoded, 64), whole_crop(wanted, 64))
    assert (eval_crop(encoded, 224) == 255).mean() < 0.02


def test_white_is_zero():
    encoded = ramp("tiff", tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(encoded)[..., 0], 255 - (RAMP >> 8))


def test_twelve_bits():
    """Two pixels in three bytes, 0xFFF and 0x800."""
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
               (279, 3)]  # fmt: skip
    tiff = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries) + b"\0" * 4
    np.testing.assert_array_equal(decode(tiff)[0, :, 0], [255, 128])


def test_sixteen_bit_colours():
    row = np.array([[0, 0, 0, 128, 7, 1, 255, 255, 3, 200, 255, 9]], np.uint8)  # two pixels
    body = zlib.compress(b"\0" + row.tobytes())
    encoded = pixels.PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    encoded += chunk(b"IDAT", body) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(encoded), [[[0, 0, 7], [255, 3, 255]]])


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.float32, "F, float"), (np.int32, "I, signed or 32-bit integer")]
)
def test_pixels_without_a_range_are_refused(dtype, mode):
    encoded = encode(Image.fromarray(RAMP.astype(dtype)), "tiff")
    for function in (decode, lambda x, name: eval_crop(x, 32, name=name)):
        with pytest.raises(DamagedImage, match=rf"x\.tif can't be decoded \(mode {mode} pixels"):
            function(encoded, name="x.tif")
    with pytest.raises(DamagedImage, match=f"mode {mode}"):
        whole_crop(encoded, 32)


# ---- the scan and the decoder


def animation(format: str) -> bytes:
    frames = [photo(30, 20), photo(30, 20).rotate(180)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


def with_text(size: int) -> bytes:
    """A PNG with much compressed text, as programs that store their settings write."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * size, zip=True)
    return encode(photo(30, 20), "png", pnginfo=info)


KINDS = {
    "cmyk.jpg": encode(photo().convert("CMYK")),
    "progressive.jpg": encode(photo(), progressive=True),
    "grey.jpg": encode(photo().convert("L")),
    "interlaced.png": encode(photo(), "png", interlace=True),
    "palette.png": encode(photo().convert("P"), "png", transparency=bytes(range(256))),
    "palette1.png": encode(photo().convert("P"), "png", transparency=3),
    "la.png": encode(photo().convert("LA"), "png"),
    "bits.png": encode(photo().convert("1"), "png"),
    "deep.png": ramp("png"),
    "text.png": with_text(3_000_000),
    "animation.png": animation("png"),
    "animation.webp": animation("webp"),
    "animation.gif": animation("gif"),
    "lossless.webp": encode(photo(), "webp", lossless=True),
    "alpha.webp": encode(photo().convert("RGBA"), "webp"),
    "cmyk.tif": encode(photo().convert("CMYK"), "tiff"),
    "bits.tif": encode(photo().convert("1"), "tiff", compression="group4"),
    "jpeg.tif": encode(photo(), "tiff", compression="jpeg"),
    "bits.pbm": encode(photo().convert("1"), "ppm"),
    "x.bmp": encode(photo(), "bmp"),
}


def look(tmp_path, name: str, content: bytes) -> tuple[bool, bool]:
    """Whether the scan passes a file, and whether all of the decoder's functions take it."""
    for path in ("a/other.png", f"b/{name}"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content if path[0] == "b" else encode(photo(9, 9), "png"))
    examples = data.open_source(f"folder:{tmp_path}").examples("train", 0, 2)
    taken = []
    for function in (decode, lambda x: eval_crop(x, 16), lambda x: whole_crop(x, 16)):
        try:
            assert function(content).dtype == np.uint8
            taken.append(True)
        except DamagedImage:
            taken.append(False)
    assert len(set(taken)) == 1
    return not examples.faults(), taken[0]


@pytest.mark.parametrize("name", KINDS)
def test_the_scan_and_the_decoder_agree(tmp_path, name):
    assert look(tmp_path, name, KINDS[name]) == (True, True)


@pytest.mark.parametrize("name", KINDS)
def test_they_agree_on_a_truncated_file(tmp_path, name):
    assert look(tmp_path, name, KINDS[name][: len(KINDS[name]) // 2]) == (False, False)


def other_frame(marker: int, bits: int) -> bytes:
    """A JPEG that announces another kind of coding, such as the lossless one of medicine."""
    jpeg = bytearray(KINDS["grey.jpg"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 1], jpeg[at + 4] = marker, bits
    return bytes(jpeg)


@pytest.mark.parametrize(("marker", "bits"), [(0xC3, 8), (0xC1, 12), (0xC5, 8), (0xF7, 8)])
def test_unusual_jpegs_are_found_by_the_scan(tmp_path, marker, bits):
    assert look(tmp_path, "x.jpg", other_frame(marker, bits)) == (False, False)


def test_an_impossible_png_is_found_by_the_scan(tmp_path):
    png = bytearray(KINDS["la.png"])
    png[24] = 3  # bits per channel
    assert look(tmp_path, "x.png", bytes(png)) == (False, False)


def test_common_files_are_not_decoded_by_the_scan():
    for name in ("progressive.jpg", "grey.jpg", "la.png", "deep.png", "lossless.webp",
                 "alpha.webp", "animation.webp"):  # fmt: skip
        assert looks_intact(io.BytesIO(KINDS[name]))


def test_first_frame():
    for format in ("png", "webp"):
        np.testing.assert_array_equal(decode(animation(format)), np.asarray(photo(30, 20)))
    gif = Image.open(io.BytesIO(animation("gif"))).convert("RGB")
    np.testing.assert_array_equal(decode(animation("gif")), np.asarray(gif))


def test_huge_images_are_decoded():
    """More than the 179 million pixels at which Pillow suspects an attack."""
    huge = encode(Image.new("1", (14_000, 14_000), 1), "png")
    assert eval_crop(huge, 32).min() == 255
    assert looks_intact(io.BytesIO(huge))


@pytest.mark.parametrize("kind", ["png", "webp", "bmp"])
def test_too_many_pixels_are_found_by_the_scan(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 640 * 480 - 1)
    monkeypatch.setattr("xkd_jax.data.intact.MAX_PIXELS", 640 * 480 - 1)
    image = photo()
    image.putalpha(128)  # WebP stores the size of such an image where the scan finds it
    encoded = encode(image, kind)
    assert look(tmp_path, f"x.{kind}", encoded) == (False, False)
    with pytest.raises(DamagedImage, match=r"it has 640 x 480 pixels, more than 307199\); repair"):
        decode(encoded)
    assert decode(encode(photo())).shape == (480, 640, 3)  # a JPEG's size is bounded by its format


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16"])
def test_large_images_are_reduced_first(monkeypatch, mode):
    image = photo(1280, 960).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    encoded = encode(image, "png")
    usual = eval_crop(encoded, 64), whole_crop(encoded, 64), decode(encoded)
    monkeypatch.setattr(pixels, "LARGE", 10_000)
    monkeypatch.setattr("xkd_jax.data.decode.LARGE", 10_000)
    large = eval_crop(encoded, 64), whole_crop(encoded, 64), decode(encoded)
    assert np.abs(large[0].astype(int) - usual[0]).mean() < 3
    # Training crops begin at whole pixels of the reduced image, as those of a JPEG do.
    assert np.abs(large[1].astype(int) - usual[1]).mean() < 8
    np.testing.assert_array_equal(large[2], usual[2])
    assert pixels.decode_pixels(encoded, 1, reduction=9.4).shape == (240, 320, 3)
