"""Image files of any format to square uint8 images, and back to JPEG or PNG.

Files that cannot be read raise OSError, whatever is wrong with them, and so do those of more pixels than `pixel_limit`.
"""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 90
RESAMPLING = Image.Resampling.BICUBIC
MAX_PIXELS = 178_956_970  # of an image file; Pillow's own limit
_COLOUR_SPACES = {1: "GRAY", 3: "RGB"}  # by channels
_UPRIGHT = {  # what turns an image of an EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NEW_SUBFILE_TYPE = 254  # of a TIFF; its lowest bit says that the image is a reduced one
_OTHER_FORMATS = (  # how files begin that Pillow does not read, what they are, and what reads them
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "HEIC", "pip install pillow-heif, or convert it"),
    (rb"\xff\x0a|....JXL ", "JPEG XL", "pip install pillow-jxl-plugin, or convert it"),
    (rb"....ftypcrx|FUJIFILMCCD-RAW|II(RO|RS|U\0)|FOVb", "raw data of a camera", "convert it, as with rawpy"),
    (rb"\s*<(\?xml|svg|!DOCTYPE svg)", "SVG", "convert it, as with cairosvg"),
    (rb"%PDF", "PDF", "convert it, as with pdf2image"),
    (rb"....ftyp", "a video", "extract its images, as with imageio"),
)

with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_jxl")  # registers itself


Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns of more, and refuses twice as many, also inside of containers


@contextlib.contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Refuse images of more pixels, within the context and in all threads; without it the limit is `MAX_PIXELS`."""
    previous, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def decode(content: bytes, channels: int) -> np.ndarray:
    """Decode an image file of any format that Pillow reads, upright, to uint8 (height, width, 1 or 3 channels)."""
    if _is_jpeg_without_exif(content):
        with contextlib.suppress(ValueError):  # CMYK, for example: Pillow reads it, or says what is wrong
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            if _is_small(width, height):
                return simplejpeg.decode_jpeg(content, _COLOUR_SPACES[channels])
    with _decoding(content):
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
    with _decoding(content):
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


def _is_small(width: int, height: int) -> bool:
    """Return True if an image has no more pixels than the limit."""
    return width * height <= (Image.MAX_IMAGE_PIXELS or 0)


def _is_jpeg_without_exif(content: bytes) -> bool:
    """Return True if the file is a JPEG without an EXIF block, which could rotate it."""
    return content.startswith(b"\xff\xd8") and b"Exif\0\0" not in content


@contextlib.contextmanager
def _decoding(content: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises for an image file into an OSError that says what is wrong with it."""
    try:
        yield
    except UnidentifiedImageError:
        for start, name, remedy in _OTHER_FORMATS:
            if re.match(start, content, re.DOTALL):
                raise OSError(f"{name}, which Pillow does not read by itself; {remedy}") from None
        raise OSError("not an image of a format that Pillow reads") from None
    except OSError:
        raise
    except Image.DecompressionBombError:
        raise OSError(f"more pixels than the limit of {Image.MAX_IMAGE_PIXELS}") from None
    except Exception as error:  # of any kind: plugins assume that files are well-formed
        raise OSError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _open_upright(content: bytes, min_size: int = 0) -> Image.Image:
    """Open an image file as an upright 8-bit image without transparency; its `format` is None if pixels were changed.

    With a `min_size`, a large JPEG may be decoded at a reduced scale with sides of at least this, which is faster.
    """
    image: Image.Image = Image.open(io.BytesIO(content))
    if not _is_small(*image.size):
        raise OSError(f"{image.width}x{image.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS}")
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0) & 1:
        raise OSError("a reduced preview, as in raw data of a camera; convert it, as with rawpy")
    if min_size:
        image.draft(None, (min_size, min_size))
    image.load()
    if (turn := _UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
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


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image: 1, upright, if its metadata cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of any kind, as above; the pixels need no metadata
        return 1
