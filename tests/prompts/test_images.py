"""Every kind of image file that a user may hand over: the right pixels or a typed error."""

import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastskip.prompts.images import MAX_PIXELS, ImageError, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """An 8-bit grey PNG whose header may promise more than its data holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format, exact", [("PNG", True), ("JPEG", False), ("WEBP", False)])
@pytest.mark.parametrize("as_path", [True, False])
def test_formats(format: str, exact: bool, as_path: bool, tmp_path: Path) -> None:
    data = encode(photo(), format)
    (tmp_path / "image").write_bytes(data)  # the content decides, not the name
    image = load_image(tmp_path / "image" if as_path else data)
    assert (image.mode, image.size) == ("RGB", (12, 8))
    if exact:
        assert image.tobytes() == photo().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours(mode: str) -> None:
    image = load_image(encode(photo(mode)))
    assert image.tobytes() == photo(mode).convert("RGB").tobytes()


def test_cmyk_is_converted() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    r, g, b = load_image(encode(cyan, "JPEG", quality=95)).getpixel((8, 8))  # type: ignore[misc]
    assert r < 10 and g > 245 and b > 245


def test_alpha_is_blended_over_white() -> None:
    source = Image.new("RGBA", (3, 1))
    source.putpixel((0, 0), (255, 0, 0, 255))
    source.putpixel((1, 0), (255, 0, 0, 0))
    source.putpixel((2, 0), (0, 0, 0, 128))
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        image = load_image(encode(source, format, **options))
        assert image.getpixel((0, 0)) == RED
        assert image.getpixel((1, 0)) == WHITE
        assert image.getpixel((2, 0)) == (127, 127, 127)


def test_grey_alpha_is_blended_over_white() -> None:
    image = load_image(encode(Image.new("LA", (2, 2), (0, 0))))
    assert image.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_transparent_palette_entry_becomes_white(transparency: int | bytes) -> None:
    source = Image.new("P", (2, 1))
    source.putpalette([*RED, *BLUE])
    source.putpixel((1, 0), 1)
    image = load_image(encode(source, transparency=transparency))
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (WHITE, BLUE)


@pytest.mark.parametrize("mode, colour, key", [("RGB", RED, RED), ("L", 7, 7)])
def test_transparent_colour_becomes_white(mode: str, colour: Any, key: Any) -> None:
    image = load_image(encode(Image.new(mode, (2, 2), colour), transparency=key))
    assert image.getpixel((0, 0)) == WHITE


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = load_image(encode(Image.fromarray(ramp)))
    assert [image.getpixel((x, 0)) for x in range(6)] == [
        (v, v, v) for v in (0, 0, 1, 0x7F, 0x80, 0xFF)
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), BLUE)
    upright.paste(RED, (0, 0, 16, 8))  # top left
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = upright
    if orientation > 1:
        turned = upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encode(turned, exif=exif))
    assert image.tobytes() == upright.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 200)])
def test_tiny(size: tuple[int, int]) -> None:
    assert load_image(encode(photo(size=size))).tobytes() == photo(size=size).tobytes()


def test_jpeg_with_a_preview_is_one_photo() -> None:
    preview = Image.new("RGB", (8, 8), RED)
    source = Image.new("RGB", (16, 16), GREEN)
    image = load_image(encode(source, "MPO", save_all=True, append_images=[preview]))
    assert image.size == (16, 16)
    assert image.getpixel((8, 8))[1] > 245  # type: ignore[index]


def test_animations_are_refused() -> None:
    frames = [photo(), Image.new("RGB", (12, 8), RED), Image.new("RGB", (12, 8), BLUE)]
    for format in ("PNG", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=r"animation of 3 frames; allowed: still images"):
            load_image(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", r"empty \(0 bytes\)"),
        (b"hello, world", r"not an image .*'hello, world'.*JPEG, PNG, WEBP"),
        (encode(photo(), "GIF"), r"not an image .*GIF89a|GIF87a"),
        (encode(photo(), "TIFF"), "allowed: JPEG, PNG, WEBP"),
        (encode(photo(), "BMP"), "allowed: JPEG, PNG, WEBP"),
        (encode(photo())[:-40], r"broken or truncated PNG"),
        (encode(photo(size=(64, 64)), "JPEG")[:-400], r"broken or truncated JPEG"),
        (encode(photo(), "WEBP")[:-40], r"WEBP"),
        (png(0, 4), "PNG"),
    ],
)
def test_broken_content(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(data)


def test_any_truncation_is_a_typed_error_or_an_image() -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        data = encode(photo(), format)
        for end in range(len(data)):
            try:
                image = load_image(data[:end])
            except ImageError:
                continue
            assert (image.mode, image.size) == ("RGB", (12, 8))  # only trailing bytes were cut


def test_any_flipped_byte_is_a_typed_error_or_an_image() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about what it finds on the way
        for format in ("PNG", "JPEG", "WEBP"):
            data = bytearray(encode(photo(), format))
            for position in range(len(data)):
                data[position] ^= 0xFF
                with suppress(ImageError):
                    assert load_image(bytes(data)).mode == "RGB"
                data[position] ^= 0xFF


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=f"pixels.*allowed: at most {MAX_PIXELS}"):
            load_image(png(side, side))


def test_limits_are_arguments(tmp_path: Path) -> None:
    data = encode(photo())
    (tmp_path / "a.png").write_bytes(data)
    limits: list[tuple[dict[str, int], str]] = [
        ({"max_pixels": 95}, "size in pixels is 96; allowed: at most 95"),
        ({"max_bytes": len(data) - 1}, f"size in bytes is {len(data)}; allowed: at most"),
        ({"max_aspect": 1}, "aspect ratio is 1.5; allowed: at most 1"),
    ]
    for limit, message in limits:
        for source in (data, tmp_path / "a.png"):
            with pytest.raises(ImageError, match=message):
                load_image(source, **limit)
    assert load_image(data, max_pixels=96, max_bytes=len(data), max_aspect=2).size == (12, 8)


def test_long_strips_are_refused() -> None:
    with pytest.raises(ImageError, match="aspect ratio is 201; allowed: at most 200"):
        load_image(encode(photo(size=(201, 1))))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder, "a directory"),
        (lambda folder: folder / "absent.png", "no such file"),
        (lambda folder: folder / ("long" * 100), "cannot be read"),
        (lambda folder: "a\0b", "cannot be read"),
        (lambda folder: "", "a directory"),
        (lambda folder: "/dev/zero", "not a regular file"),
        (lambda folder: "https://example.org/cat.png", "a URL; allowed: local files"),
        (lambda folder: "data:image/png;base64,AAAA", "a URL"),
    ],
)
def test_paths_that_are_no_images(
    make: Callable[[Path], Path | str], message: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(caught.value).startswith(str(path))
