"""Picture files of any kind to uint8 images: upright, in colour or grey, square."""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 90
_COLOURS = {1: "GRAY", 3: "RGB"}  # by channels
Image.MAX_IMAGE_PIXELS = None  # the pictures are the user's own, however large


def decode(content: bytes, channels: int) -> np.ndarray:
    """The pixels of a stored image.

    Args:
      content: of a file, in any format that Pillow reads.
      channels: 1 (grey) or 3 (RGB).

    Returns:
      (height, width, channels) of uint8.

    Raises:
      OSError: it cannot be read as a picture.
    """
    if _is_plain_jpeg(content):
        with contextlib.suppress(ValueError):  # CMYK, say; Pillow knows, or says what is wrong
            return simplejpeg.decode_jpeg(content, _COLOURS[channels])
    picture = _upright(content).convert("RGB" if channels == 3 else "L")
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side to ``size`` pixels and cuts out the central square (paper, section 2).

    Args:
      image: (height, width, channels) of uint8; channels are 1 or 3.

    Returns:
      (size, size, channels) of uint8; the same array, where nothing is to be done.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(_square(picture, size)).reshape(size, size, -1)


def fill(into: np.ndarray, image: np.ndarray | bytes) -> None:
    """Writes an image's square into an array, which for a JPEG of that size is where it is decoded.

    Args:
      into: (size, size, channels) of uint8.
      image: an array, as for ``square``, or the content of a file.

    Raises:
      OSError: it cannot be read as a picture.
    """
    if isinstance(image, bytes):
        size, _, channels = into.shape
        if _is_plain_jpeg(image):
            with contextlib.suppress(ValueError):
                if simplejpeg.decode_jpeg_header(image)[:2] == (size, size):
                    simplejpeg.decode_jpeg(image, _COLOURS[channels], buffer=into)
                    return
        image = decode(image, channels)
    into[:] = square(image, len(into))


def square_jpeg(content: bytes, size: int) -> bytes:
    """A picture file as a JPEG of a square in colour, as ``square`` cuts it out.

    Whatever is transparent gets a white background; 16 bits become 8; a photo that was taken sideways is turned. A
    JPEG that is such a square already stays as it is.

    Raises:
      OSError: it cannot be read as a picture, or is damaged.
    """
    picture = _upright(content, at_least=2 * size)
    if picture.format == "JPEG" and picture.mode == "RGB" and picture.size == (size, size):
        return content
    jpeg = io.BytesIO()
    _square(picture.convert("RGB"), size).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether nothing in a JPEG could say that it is to be turned."""
    return content.startswith(b"\xff\xd8") and content.find(b"Exif\0\0", 0, 4096) < 0


def png(image: np.ndarray) -> bytes:
    """An image (height, width, 3) of uint8 as a PNG, which keeps every pixel."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _square(picture: Image.Image, size: int) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _upright(content: bytes, at_least: int = 0) -> Image.Image:
    """A picture as it is to be looked at, of 8 bits and without transparency.

    It has a ``format`` only if nothing was to be done.

    Args:
      at_least: sides of a large JPEG, in pixels, above which it may come out smaller than it is: that is faster.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
        if at_least:
            picture.draft(None, (at_least, at_least))
        picture.load()
    except UnidentifiedImageError:
        raise OSError("is no picture of a kind that Pillow reads") from None
    except (SyntaxError, ValueError, EOFError) as error:  # Pillow's plugins raise these, too
        raise OSError(f"cannot be read as a picture: {error}") from error
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise OSError(f"its values go from {values.min()} to {values.max()}, and 16 bits end at 65535")
        return Image.fromarray((values / 257 + 0.5).astype(np.uint8))
    if picture.mode == "F":
        raise OSError("its pixels are floats, and nothing says what is white; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture
