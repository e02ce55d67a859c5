"""Pictures of every kind come out as one would see them."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from alexnet_jax import pictures

RED, BLUE = (250, 10, 20), (10, 20, 250)


def two_halves(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Red above, blue below."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (0, size[1] // 2, *size))
    return picture.convert(mode)


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def is_red_above_blue(image: np.ndarray, tolerance: int = 12) -> bool:
    side = len(image)
    above, below = image[: side // 2 - 4].reshape(-1, 3), image[side // 2 + 4 :].reshape(-1, 3)
    return bool((abs(above - RED) <= tolerance).all() and (abs(below - BLUE) <= tolerance).all())


def sideways(orientation: int, operation: Image.Transpose) -> bytes:
    """A photo that was taken sideways, with the tag that says how it is to be turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(two_halves().transpose(operation), "JPEG", exif=exif, quality=95)


def transparent() -> bytes:
    """Blue at the bottom shines through nothing; above there is only paper."""
    picture = two_halves("RGBA")
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, picture.width, picture.height // 2))
    picture.putalpha(alpha)
    return saved(picture, "PNG")


COLOURED = {
    "JPEG": saved(two_halves(), "JPEG", quality=95),
    "PNG": saved(two_halves(), "PNG"),
    "palette": saved(two_halves().quantize(2), "PNG"),
    "GIF": saved(two_halves().quantize(2), "GIF"),
    "CMYK": saved(two_halves("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": saved(two_halves("CMYK"), "TIFF"),
    "WebP": saved(two_halves(), "WEBP", quality=100),
    "BMP": saved(two_halves(), "BMP"),
    "opaque alpha": saved(two_halves("RGBA"), "PNG"),
    "turned left": sideways(6, Image.Transpose.ROTATE_90),
    "turned right": sideways(8, Image.Transpose.ROTATE_270),
    "upside down": sideways(3, Image.Transpose.ROTATE_180),
    "tiny": saved(two_halves(size=(2, 2)).resize((16, 16), Image.Resampling.NEAREST), "PNG"),
    "wide": saved(two_halves(size=(900, 40)), "PNG"),
    "huge": saved(two_halves(size=(12_000, 9_000)), "JPEG"),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_a_coloured_picture_becomes_a_square_jpeg(kind: str) -> None:
    stored = pictures.square_jpeg(COLOURED[kind], 48)
    with Image.open(io.BytesIO(stored)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (48, 48))
    assert is_red_above_blue(pixels(stored))
    if kind != "huge":
        assert is_red_above_blue(pictures.square(pictures.decode(COLOURED[kind], 3), 48))


def grey_ramp(kind: str) -> bytes:
    """From black on the left to white on the right."""
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    if kind == "8 bits":
        return saved(Image.fromarray(ramp.astype(np.uint8)), "PNG")
    if kind == "16 bits":
        return saved(Image.fromarray((ramp * 257).astype(np.uint16)), "PNG")
    if kind == "16 bits TIFF":
        return saved(Image.fromarray((ramp * 257).astype(np.uint16)), "TIFF")
    if kind == "32 bits":
        return saved(Image.fromarray((ramp * 257).astype(np.int32)), "TIFF")
    if kind == "JPEG":
        return saved(Image.fromarray(ramp.astype(np.uint8)), "JPEG", quality=95)
    alpha = Image.fromarray(ramp.astype(np.uint8)).convert("LA")
    return saved(alpha, "PNG")


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "16 bits TIFF", "32 bits", "JPEG", "with alpha"])
def test_a_grey_picture_becomes_one_in_colour_and_can_be_read_as_grey(kind: str) -> None:
    ramp = np.linspace(0, 255, 64)
    stored = pixels(pictures.square_jpeg(grey_ramp(kind), 64))
    np.testing.assert_allclose(stored, np.broadcast_to(ramp[:, None], (64, 64, 3)), atol=4)
    grey = pictures.decode(grey_ramp(kind), 1)
    assert grey.shape == (64, 64, 1)
    np.testing.assert_allclose(grey[0, :, 0], ramp, atol=2)


def test_one_bit_is_black_and_white() -> None:
    bits = Image.new("1", (16, 16), 1)
    bits.paste(0, (0, 8, 16, 16))
    grey = pictures.decode(saved(bits, "PNG"), 1)
    assert (grey[:8].min(), grey[8:].max()) == (255, 0)


def test_what_is_transparent_gets_white_paper() -> None:
    image = pictures.decode(transparent(), 3)
    assert (image[:19] == 255).all()
    assert (image[21:] == BLUE).all()


@pytest.mark.parametrize("size", [40, 48, 60])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK", "turned left", "square", "array"])
def test_an_image_is_filled_in_as_it_is_decoded(kind: str, size: int) -> None:
    square = saved(two_halves(size=(48, 48)), "JPEG")
    content = (COLOURED | {"square": square, "array": pictures.decode(COLOURED["PNG"], 3)})[kind]
    into = np.zeros((size, size, 3), np.uint8)
    pictures.fill(into, content)
    whole = pictures.decode(content, 3) if isinstance(content, bytes) else content
    np.testing.assert_array_equal(into, pictures.square(whole, size))


def test_a_square_jpeg_of_the_right_size_stays_as_it_is() -> None:
    content = saved(two_halves(size=(48, 48)), "JPEG")
    assert pictures.square_jpeg(content, 48) is content


def test_a_decoded_jpeg_is_what_pillow_decodes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)
    content = saved(Image.fromarray(noise).resize((112, 80)), "JPEG", quality=80)
    np.testing.assert_array_equal(pictures.decode(content, 3), pixels(content))


def test_a_png_keeps_every_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pictures.decode(pictures.png(noise), 3), noise)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no picture of a kind"),
        (b"hello", "no picture of a kind"),
        (b"\xff\xd8\xff\xe0", "no picture of a kind"),
        (COLOURED["JPEG"][: len(COLOURED["JPEG"]) // 2], "(?i)truncated"),
        (COLOURED["PNG"][:-40], "truncated"),
        (saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "70000, and 16 bits end at 65535"),
        (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floats"),
    ],
)
def test_what_is_no_whole_picture_is_refused(content: bytes, message: str) -> None:
    for read in (lambda: pictures.decode(content, 3), lambda: pictures.square_jpeg(content, 16)):
        with pytest.raises(OSError, match=message):
            read()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (64, 64), (8, 9)])
def test_images_of_any_size_become_central_squares(height: int, width: int, channels: int) -> None:
    """Half black, half white, with the border in the middle of the longer side: so it stays."""
    image = np.zeros((height, width, channels), np.uint8)
    if height > width:
        image[height // 2 :] = 255
    else:
        image[:, width // 2 :] = 255
    fitted = pictures.square(image, 32)
    assert fitted.shape == (32, 32, channels)
    halves = fitted if height > width else fitted.swapaxes(0, 1)
    assert halves[:10].max() < 10
    assert halves[-10:].min() > 245


def test_images_of_the_right_size_are_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert pictures.square(image, 32) is image
