"""Image files to arrays: every colour mode to 8-bit RGB or grey, and ADM's centre crop."""

import contextlib
import errno
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sra_jax.errors import RunError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, whatever the file's name; Pillow's other decoders never see a user's files."""

LARGEST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow refuses to decode larger images, as bombs; none is enlarged beyond it either."""

_FILE_S_OWN = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""Errors that lie in one file; None: Pillow's. Others are the system's: too many open files, a disk that is away."""


class UnreadableImageError(Exception):
    """A file that holds no image that can be used; the message says why."""


def read_image(content: bytes | Path | np.ndarray) -> Image.Image:
    """An image in mode L (grey) or RGB, 8 bits a channel.

    Palettes are looked up, CMYK and other colour spaces converted, 16-bit grey scaled to 8 bits (v/257), transparent
    pixels laid on white. EXIF orientation is ignored, as in ADM's data pipeline.

    Args:
      content: an encoded image, the path of one, or an array (H,W), (H,W,1) or (H,W,3) uint8.

    Raises:
      UnreadableImageError: not an image of FORMATS, damaged, too large, or of a mode without a defined range (floating
        point).
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content[..., 0] if content.ndim == 3 and content.shape[-1] == 1 else content)
    with opened(content) as image:
        return _to_8_bits(image)


@contextlib.contextmanager
def opened(content: bytes | Path) -> Iterator[Image.Image]:
    """An encoded image, or the path of one, decoded.

    Raises:
      UnreadableImageError: it is none, damaged, or too large; also where the block cannot work with it.
      RunError: the system cannot read it, which says nothing about the image.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
            image.load()
            yield image
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(f"holds no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except UnreadableImageError:
        raise
    except OSError as error:
        if error.errno not in _FILE_S_OWN:
            raise RunError(f"{content!s} cannot be read now ({error.strerror}): mend that and start again") from error
        raise UnreadableImageError(error.strerror or f"{error}" or type(error).__name__) from error
    except Exception as error:  # decoders meet damaged files with every kind of error: SyntaxError, struct.error, ...
        raise UnreadableImageError(f"{error}" or type(error).__name__) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit files come in one of these modes; convert("L") would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values from {values.min()} to {values.max()} are beyond 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol, arXiv 2105.05233), to which the field's ImageNet figures refer.

    The image is halved with a box filter while its shorter side is at least 2*size, resized with Pillow's bicubic
    filter so that its shorter side is `size` (smaller images are enlarged), and cropped to the centre.

    Args:
      image: any size.
      size: side of the result in pixels.

    Returns:
      An image of size x size in the same mode.

    Raises:
      UnreadableImageError: a strip so thin that its enlargement would not fit into memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    width, height = round(image.width * factor), round(image.height * factor)
    if width * height > LARGEST_PIXELS:
        raise UnreadableImageError(f"its sides of {image.width} and {image.height} pixels differ too much to crop it")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square_crop(image: Image.Image, size: int) -> Image.Image:
    """U-ViT's preprocessing of COCO (Bao et al., arXiv 2209.12152), to which published text-to-image figures refer.

    The largest square in the centre, resized with Pillow's Lanczos filter; arguments and result as `centre_crop`.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"adm": centre_crop, "square": square_crop}
"""By name: how a picture becomes a square of a size."""


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """(H,W,channels) uint8; colour becomes grey by luma (ITU-R 601) for one channel, grey is repeated for three.

    Raises:
      ValueError: channels is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[..., None] if channels == 1 else array
