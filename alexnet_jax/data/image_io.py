"""Image files of any format to square uint8 images, and back to JPEG or PNG. Unreadable files raise OSError."""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 90
RESAMPLING = Image.Resampling.BICUBIC
_COLOUR_SPACES = {1: "GRAY", 3: "RGB"}  # by channels
Image.MAX_IMAGE_PIXELS = None  # the images are the user's own, however large


def decode(content: bytes, channels: int) -> np.ndarray:
    """Decode an image file of any format that Pillow reads, upright, to uint8 (height, width, 1 or 3 channels)."""
    if _is_jpeg_without_exif(content):
        with contextlib.suppress(ValueError):  # CMYK, for example: Pillow reads it, or says what is wrong
            return simplejpeg.decode_jpeg(content, _COLOUR_SPACES[channels])
    image = _open_upright(content).convert("RGB" if channels == 3 else "L")
    return np.asarray(image).reshape(image.height, image.width, channels)


def decode_into(array: np.ndarray, image: np.ndarray | bytes) -> None:
    """Write an image or image file, resized and cropped, into a uint8 array (size, size, channels).

    A JPEG of that size is decoded in place.
    """
    if isinstance(image, bytes):
        size, _, channels = array.shape
        if _is_jpeg_without_exif(image):
            with contextlib.suppress(ValueError):
                if simplejpeg.decode_jpeg_header(image)[:2] == (size, size):
                    simplejpeg.decode_jpeg(image, _COLOUR_SPACES[channels], buffer=array)
                    return
        image = decode(image, channels)
    array[:] = resize_and_crop(image, len(array))


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side to `size` pixels and crop the central square (paper, section 2).

    Images are uint8 (height, width, 1 or 3 channels); one that has this size already is returned itself.
    """
    if image.shape[:2] == (size, size):
        return image
    pillow_image = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(ImageOps.fit(pillow_image, (size, size), RESAMPLING)).reshape(size, size, -1)


def encode_jpeg(content: bytes, size: int) -> bytes:
    """Convert an image file to an RGB JPEG, resized and cropped as by `resize_and_crop`.

    The image is turned upright, transparency becomes white, and 16 bits become 8. A JPEG of this size is kept as it is.
    """
    image = _open_upright(content, min_size=2 * size)
    if image.format == "JPEG" and image.mode == "RGB" and image.size == (size, size):
        return content
    jpeg = io.BytesIO()
    ImageOps.fit(image.convert("RGB"), (size, size), RESAMPLING).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def encode_png(image: np.ndarray) -> bytes:
    """Encode a uint8 (height, width, 3) image as a PNG, which is lossless."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _is_jpeg_without_exif(content: bytes) -> bool:
    """Return True if the file is a JPEG without an EXIF block, which could rotate it."""
    return content.startswith(b"\xff\xd8") and content.find(b"Exif\0\0", 0, 4096) < 0


def _open_upright(content: bytes, min_size: int = 0) -> Image.Image:
    """Open an image file as an upright 8-bit image without transparency; its `format` is None if pixels were changed.

    With a `min_size`, a large JPEG may be decoded at a reduced scale with sides of at least this, which is faster.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if min_size:
            image.draft(None, (min_size, min_size))
        image.load()
    except UnidentifiedImageError:
        raise OSError("not an image of a format that Pillow reads") from None
    except (SyntaxError, ValueError, EOFError) as error:  # Pillow's plugins raise these, too
        raise OSError(f"cannot be decoded: {error}") from error
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise OSError(f"pixels must be from 0 to 65535, not {values.min()} to {values.max()}; save as 8 or 16 bits")
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise OSError("pixels must be integers, not floats, whose white level is unknown; save as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
