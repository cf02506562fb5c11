"""Untrusted image files: checked before they are decoded, returned as plain RGB.

Format, bytes, pixels and aspect ratio are limited because files may come from anyone: a few
kilobytes of PNG can expand to gigabytes of pixels. URLs (http:, data:, ...) are never opened.
"""

import stat
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 32 << 20
MAX_PIXELS = 50_000_000
# processors scale the short side to a fixed length, so a thin strip would become enormous
MAX_ASPECT = 200


class ImageError(ValueError):
    """An unusable image; names the file, what is wrong and what is allowed."""


def load_image(
    source: str | PathLike[str] | bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    max_aspect: int = MAX_ASPECT,
) -> Image.Image:
    """Read a JPEG, PNG or WEBP file, or its bytes, as an upright RGB image without transparency.

    Transparent pixels are blended over white, 16-bit grey keeps its high byte, EXIF rotation is
    applied. Everything else, animations included, raises `ImageError`.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else fspath(source)
    try:
        data = source if isinstance(source, bytes) else _read(source, max_bytes)
        _check("size in bytes", len(data), max_bytes)
        with _open(data, max_pixels) as image:
            _check("size in pixels", image.width * image.height, max_pixels)
            _check("aspect ratio", max(image.size) / max(1, min(image.size)), max_aspect)
            # an MPO (a JPEG with several frames) is a photo with previews; the photo comes first
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ImageError(
                    f"an animation of {image.n_frames} frames; allowed: still images (save the "
                    "frame you want as a separate file)"
                )
            return _decode(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error.__cause__


def is_url(name: str) -> bool:
    """Whether a name is a URL (http:, data:, ...) and not a path."""
    return "://" in name or name.startswith("data:")


def _read(path: str | PathLike[str], max_bytes: int) -> bytes:
    if is_url(fspath(path)):
        raise ImageError("a URL; allowed: local files (download it first)")
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise ImageError(f"{kind}; allowed: a {', '.join(FORMATS)} file")
        _check("size in bytes", status.st_size, max_bytes)
        with Path(path).open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ImageError("no such file; allowed: the path of an existing image") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read ({error}); allowed: a readable image file") from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Parse the header without decoding any pixels."""
    if not data:
        raise ImageError(f"empty (0 bytes); allowed: a {', '.join(FORMATS)} file")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # report Pillow's own limit only if it is the tighter one
        size = str(error).partition(" exceeds")[0]
        limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
        raise ImageError(f"too many: {size}; allowed: at most {limit} pixels") from error
    # on hostile input Pillow fails in many ways: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        start = data[:12].decode("ascii", "backslashreplace")
        raise ImageError(
            f"not an image in a known format (starts with {start!r}); allowed: {', '.join(FORMATS)}"
        ) from error


def _check(what: str, value: float, limit: int) -> None:
    if value > limit:
        raise ImageError(f"{what} is {value:.10g}; allowed: at most {limit}")


def _decode(image: Image.Image) -> Image.Image:
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return _from_16_bit(upright)
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        pixels = upright.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    except Exception as error:
        raise ImageError(
            f"broken or truncated {image.format} ({error}); allowed: a complete file"
        ) from error


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow would clip it at 255."""
    grey = np.asarray(image).astype(np.int64)
    if (transparent := image.info.get("transparency")) is not None:
        grey = np.where(grey == transparent, 0xFFFF, grey)
    return Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
