"""Tests of decoding, cropping and encoding image files of every kind."""

import collections
import io
import runpy
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from alexnet_jax.data import image_io
from support import REPOSITORY

RED, BLUE = (250, 10, 20), (10, 20, 250)


def two_halves(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Return an image that is red above and blue below."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, size[1] // 2, *size))
    return image.convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pillow_decode(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def is_red_above_blue(image: np.ndarray, tolerance: int = 12) -> bool:
    side = len(image)
    above, below = image[: side // 2 - 4].reshape(-1, 3), image[side // 2 + 4 :].reshape(-1, 3)
    return bool((abs(above - RED) <= tolerance).all() and (abs(below - BLUE) <= tolerance).all())


def sideways(orientation: int, operation: Image.Transpose) -> bytes:
    """Return a photo that was taken sideways, with its EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encode(two_halves().transpose(operation), "JPEG", exif=exif, quality=95)


def with_long_comment(jpeg: bytes) -> bytes:
    """Return a JPEG with a comment of 5,000 bytes before its other blocks."""
    return jpeg[:2] + b"\xff\xfe" + (5002).to_bytes(2, "big") + bytes(5000) + jpeg[2:]


def transparent() -> bytes:
    """Return an image with a transparent upper half above an opaque blue one."""
    image = two_halves("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, image.width, image.height // 2))
    image.putalpha(alpha)
    return encode(image, "PNG")


COLOURED = {
    "JPEG": encode(two_halves(), "JPEG", quality=95),
    "PNG": encode(two_halves(), "PNG"),
    "palette": encode(two_halves().quantize(2), "PNG"),
    "GIF": encode(two_halves().quantize(2), "GIF"),
    "CMYK": encode(two_halves("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": encode(two_halves("CMYK"), "TIFF"),
    "WebP": encode(two_halves(), "WEBP", quality=100),
    "BMP": encode(two_halves(), "BMP"),
    "opaque alpha": encode(two_halves("RGBA"), "PNG"),
    "turned left": sideways(6, Image.Transpose.ROTATE_90),
    "turned right": sideways(8, Image.Transpose.ROTATE_270),
    "upside down": sideways(3, Image.Transpose.ROTATE_180),
    "comment before EXIF": with_long_comment(sideways(6, Image.Transpose.ROTATE_90)),
    "tiny": encode(two_halves(size=(2, 2)).resize((16, 16), Image.Resampling.NEAREST), "PNG"),
    "wide": encode(two_halves(size=(900, 40)), "PNG"),
    "huge": encode(two_halves(size=(12_000, 9_000)), "JPEG"),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_colour_image_becomes_square_jpeg(kind: str) -> None:
    stored = image_io.encode_jpeg(COLOURED[kind], 48)
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))
    assert is_red_above_blue(pillow_decode(stored))
    if kind != "huge":
        assert is_red_above_blue(image_io.resize_and_crop(image_io.decode(COLOURED[kind], 3), 48))


def grey_ramp(kind: str) -> bytes:
    """Return an image from black on the left to white on the right."""
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    if kind == "8 bits":
        return encode(Image.fromarray(ramp.astype(np.uint8)), "PNG")
    if kind == "16 bits":
        return encode(Image.fromarray((ramp * 257).astype(np.uint16)), "PNG")
    if kind == "16 bits TIFF":
        return encode(Image.fromarray((ramp * 257).astype(np.uint16)), "TIFF")
    if kind == "32 bits":
        return encode(Image.fromarray((ramp * 257).astype(np.int32)), "TIFF")
    if kind == "JPEG":
        return encode(Image.fromarray(ramp.astype(np.uint8)), "JPEG", quality=95)
    alpha = Image.fromarray(ramp.astype(np.uint8)).convert("LA")
    return encode(alpha, "PNG")


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "16 bits TIFF", "32 bits", "JPEG", "with alpha"])
def test_grey_image_becomes_colour_jpeg_and_decodes_to_grey(kind: str) -> None:
    ramp = np.linspace(0, 255, 64)
    stored = pillow_decode(image_io.encode_jpeg(grey_ramp(kind), 64))
    np.testing.assert_allclose(stored, np.broadcast_to(ramp[:, None], (64, 64, 3)), atol=4)
    grey = image_io.decode(grey_ramp(kind), 1)
    assert grey.shape == (64, 64, 1)
    np.testing.assert_allclose(grey[0, :, 0], ramp, atol=2)


def test_one_bit_image_is_black_and_white() -> None:
    bits = Image.new("1", (16, 16), 1)
    bits.paste(0, (0, 8, 16, 16))
    grey = image_io.decode(encode(bits, "PNG"), 1)
    assert (grey[:8].min(), grey[8:].max()) == (255, 0)


def test_transparency_becomes_white() -> None:
    image = image_io.decode(transparent(), 3)
    assert (image[:19] == 255).all()
    assert (image[21:] == BLUE).all()


@pytest.mark.parametrize("size", [40, 48, 60])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK", "turned left", "square", "array"])
def test_decoding_into_an_array_equals_decoding_and_cropping(kind: str, size: int) -> None:
    square = encode(two_halves(size=(48, 48)), "JPEG")
    files: dict[str, Any] = COLOURED | {"square": square, "array": image_io.decode(COLOURED["PNG"], 3)}
    content = files[kind]
    array = np.zeros((size, size, 3), np.uint8)
    image_io.decode_into(array, content)
    whole = image_io.decode(content, 3) if isinstance(content, bytes) else content
    np.testing.assert_array_equal(array, image_io.resize_and_crop(whole, size))


def test_square_jpeg_of_right_size_is_kept() -> None:
    content = encode(two_halves(size=(48, 48)), "JPEG")
    assert image_io.encode_jpeg(content, 48) is content


def test_jpeg_decodes_as_with_pillow() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    content = encode(Image.fromarray(noise).resize((112, 80)), "JPEG", quality=80)
    np.testing.assert_array_equal(image_io.decode(content, 3), pillow_decode(content))


def test_png_is_lossless() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(image_io.decode(image_io.encode_png(noise), 3), noise)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image of a format"),
        (b"hello", "not an image of a format"),
        (b"\xff\xd8\xff\xe0", "not an image of a format"),
        (COLOURED["JPEG"][: len(COLOURED["JPEG"]) // 2], "(?i)truncated"),
        (COLOURED["PNG"][:-40], "truncated"),
        (
            encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
            "must be from 0 to 65535, not 70000 to 70000; save",
        ),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "not floats"),
    ],
)
def test_invalid_image_raises(content: bytes, message: str) -> None:
    for read in (lambda: image_io.decode(content, 3), lambda: image_io.encode_jpeg(content, 16)):
        with pytest.raises(OSError, match=message):
            read()


def png_with_text(key: str, value: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value, zip=True)
    return encode(two_halves(), "PNG", pnginfo=info)


def exif_block(orientation: bytes) -> bytes:
    """Return an EXIF block whose orientation has these bytes: type, count and value."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + orientation + bytes(4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "content",
    [
        png_with_text("Raw profile type exif", "\nexif\n      12\n0008000201120003\n"),
        png_with_text("Raw profile type exif", "\nexif\n      12\nno digits\n"),
        encode(two_halves(), "PNG", exif=b"\0\x08\0\2\1\x12\0\3"),
        encode(two_halves(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        encode(two_halves(), "JPEG", quality=95, exif=exif_block(b"\0\x02\0\0\0\x02up\0\0")),  # text
        encode(two_halves(), "JPEG", quality=95, exif=exif_block(b"\0\x03\0\0\0\x01\0\x63\0\0")),  # 99
        encode(two_halves(), "WEBP", quality=100, exif=b"MM\0*\0\0\xff\xff"),
    ],
)
def test_unreadable_metadata_mean_upright(content: bytes) -> None:
    assert is_red_above_blue(image_io.resize_and_crop(image_io.decode(content, 3), 48))
    assert is_red_above_blue(pillow_decode(image_io.encode_jpeg(content, 48)))


def claiming_png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = COLOURED["PNG"]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def claiming_jpeg(width: int, height: int) -> bytes:
    frame = b"\xff\xc0\x00\x11\x08"
    start, _, rest = COLOURED["JPEG"].partition(frame)
    return start + frame + struct.pack(">HH", height, width) + rest[4:]


def claiming_bmp(width: int, height: int) -> bytes:
    content = COLOURED["BMP"]
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("claiming", [claiming_png, claiming_jpeg, claiming_bmp])
def test_image_that_claims_too_many_pixels_is_refused_by_its_header(
    claiming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_red_above_blue(image_io.resize_and_crop(image_io.decode(claiming(60, 40), 3), 48))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels must not be read"))
    monkeypatch.setattr(image_io.simplejpeg, "decode_jpeg", lambda *_: pytest.fail("its pixels must not be read"))
    for content in (claiming(13_378, 13_378), claiming(65_000, 65_000)):
        with pytest.raises(OSError, match=r"more (pixels )?than the limit of 178956970"):
            image_io.decode(content, 3)
        with pytest.raises(OSError, match=r"more (pixels )?than the limit of 178956970"):
            image_io.encode_jpeg(content, 16)
    with image_io.pixel_limit(2399), pytest.raises(OSError, match="60x40 pixels, more than the limit of 2399"):
        image_io.encode_jpeg(claiming(60, 40), 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic", "HEIC, which .*; pip install pillow-heif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC, "),
        (b"\xff\x0a\xcb\6\0\x13\x88\2", "JPEG XL, which .*; pip install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, "),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw data of a camera, which .*; convert it, as with rawpy"),
        (b'<?xml version="1.0"?><svg>', "SVG, which .* cairosvg"),
        (b"%PDF-1.7", "PDF, which .* pdf2image"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video, "),
        (encode(two_halves(), "TIFF", tiffinfo={254: 1}), "a reduced preview, as in raw data of a camera"),
    ],
)
def test_format_that_is_not_read_is_named_with_its_remedy(content: bytes, message: str) -> None:
    with pytest.raises(OSError, match=f"^{message}"):
        image_io.encode_jpeg(content, 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what is damaged
def test_mutated_files_are_read_or_named() -> None:
    """A short form of experiments/reliability/images.py."""
    attempt = runpy.run_path(str(REPOSITORY / "experiments" / "reliability" / "images.py"))["attempt"]
    outcomes = collections.Counter(attempt(number).outcome for number in range(300))
    assert set(outcomes) == {"read", "named"}, outcomes


@pytest.mark.parametrize("error", [struct.error, SyntaxError, OverflowError, MemoryError, AssertionError, EOFError])
def test_whatever_decoding_raises_is_a_named_bad_image(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise error("no")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    for read in (lambda: image_io.decode(COLOURED["PNG"], 3), lambda: image_io.encode_jpeg(COLOURED["PNG"], 16)):
        with pytest.raises(OSError, match=rf"^cannot be decoded \({error.__name__}: no\)$"):
            read()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (8, 9)])
def test_central_square_is_cropped(height: int, width: int, channels: int) -> None:
    """An image that is half black and half white along its longer side stays so."""
    image = np.zeros((height, width, channels), np.uint8)
    if height > width:
        image[height // 2 :] = 255
    else:
        image[:, width // 2 :] = 255
    fitted = image_io.resize_and_crop(image, 32)
    assert fitted.shape == (32, 32, channels)
    halves = fitted if height > width else fitted.swapaxes(0, 1)
    assert halves[:10].max() < 10
    assert halves[-10:].min() > 245


def test_image_of_right_size_is_not_copied() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert image_io.resize_and_crop(image, 32) is image
