"""From the bytes of a file to a `Picture`: upright, RGB, 8 bits, with a warning for all that was done to it.

Strategy: the format is read from the first bytes, before Pillow sees them, and only that one format's reader is used;
the number of pixels is checked from the header before anything is decoded; every mode Pillow can return is brought to
RGB by one rule.

Rules:
- Hostile bytes are the normal case. Whatever a Pillow reader raises on them becomes `InvalidImage` or one of its kinds.
- No global setting of Pillow is read or changed, nor the warning filters, so any number of threads may read at once.
  Readers are called themselves because `Image.open` judges size by such a global setting.
- What Pillow only warns of (broken metadata beside sound pixels) is not a reason to refuse a photograph.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from service.encoders.protocol import Picture
from service.errors import ImageTooLarge, InvalidImage, NothingObserved, TruncatedImage, UnsupportedImageFormat

PIXELS_MAX = 50_000_000
"""The largest picture read: above any camera in common use (48 megapixels), and 150 MB once it is RGB."""

SIDE_MAX = 32_768
"""The longest side read: a picture of 1 x 50,000,000 is within the limit above and breaks whoever resizes it."""

PictureFormat = Literal["png", "webp"]
"""What is written."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_MEDIA_TYPES = {name: f"image/{name.lower()}" for name in FORMATS}

_READERS: dict[str, Callable[[io.BytesIO, str], ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    # Not `jpeg_factory`, which makes a phone's multi-picture JPEG an MPO: its first picture is the photograph.
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)

# Image formats that people do send and that are not read: only so that the refusal can name them.
_REFUSED_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x00\x00\x01\x00", "ICO"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG or other XML"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"qoif", "QOI"),
    (b"%!PS", "PostScript"),
)

# EXIF tag 0x0112: what turns the stored picture upright (EXIF 2.32, section 4.6.4).
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def media_type(data: bytes) -> str:
    """The media type ("image/jpeg") of an image file, from its first bytes.

    Raises `UnsupportedImageFormat` for an image format that is not read, `InvalidImage` for anything else.
    """
    return _MEDIA_TYPES[_format(data)]


def read_picture(data: bytes, mask: bytes | None = None, pixels_max: int = PIXELS_MAX) -> Picture:
    """Decode and normalise an image file.

    `mask` is an image file of any size: where it is brighter than half of its own brightest point (so white on black,
    in 0/1 or 0/255, and also after JPEG's ringing) the picture is **missing**. It is resized to the upright picture by
    nearest neighbour.

    Raises `UnsupportedImageFormat`, `ImageTooLarge` (more than `pixels_max` pixels, a side over `SIDE_MAX`),
    `TruncatedImage`, `InvalidImage`, and `NothingObserved` when the mask leaves nothing.
    """
    pixels, warnings = _decode(data, pixels_max)
    if mask is None:
        return Picture(pixels, None, tuple(warnings))
    try:
        mask_pixels, mask_warnings = _decode(mask, pixels_max)
    except InvalidImage as error:
        raise type(error)(f"mask: {error.detail}") from error
    warnings += [f"mask: {warning}" for warning in mask_warnings]
    grey = Image.fromarray(mask_pixels).convert("L")
    height, width = pixels.shape[:2]
    if grey.size != (width, height):
        warnings.append(f"mask resized from {grey.width}x{grey.height} to the picture's {width}x{height}")
        grey = grey.resize((width, height), Image.Resampling.NEAREST)
    values = np.asarray(grey)
    missing = 2 * values.astype(np.uint16) > values.max()
    if missing.all():
        raise NothingObserved("the mask marks the whole picture as missing")
    return Picture(pixels, ~missing if missing.any() else None, tuple(warnings))


def write_png(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) uint8 → a PNG file."""
    return write_picture(pixels, "png")


def write_picture(pixels: NDArray[np.uint8], format_: PictureFormat) -> bytes:
    """(height, width, 3) uint8 → a file that holds just these pixels: WebP is its lossless kind."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_, **({"lossless": True} if format_ == "webp" else {}))
    return buffer.getvalue()


def _format(data: bytes) -> str:
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    accepted = f"accepted are {', '.join(FORMATS)}"
    if not data:
        raise InvalidImage(f"the file is empty; {accepted}")
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace")
        raise UnsupportedImageFormat(f"ISO media (HEIC, AVIF; brand {brand!r}) is not read; {accepted}")
    start = data[:64].lstrip()
    for signature, name in _REFUSED_SIGNATURES:
        if start.startswith(signature):
            raise UnsupportedImageFormat(f"{name} is not read; {accepted}")
    raise InvalidImage(f"the first bytes are those of no image format; {accepted}")


def _decode(data: bytes, pixels_max: int) -> tuple[NDArray[np.uint8], list[str]]:
    """From bytes to (height, width, 3) uint8 pixels and warnings; every foreign error is translated here."""
    name = _format(data)
    try:
        with _READERS[name](io.BytesIO(data), "") as image:
            _check_size(image.width, image.height, pixels_max)
            warnings: list[str] = []
            if getattr(image, "is_animated", False):
                warnings.append("first frame of several kept")
            # Before `load`: the TIFF reader turns the picture itself and then forgets that it did.
            orientation = _orientation(image) if name == "TIFF" else 1
            bits = _bits_per_channel(image, data, name)
            image.load()
            _check_size(image.width, image.height, pixels_max)
            rgb = _to_rgb(image, bits, warnings)
            if name != "TIFF":
                # After `load`: a PNG may carry EXIF behind its pixels.
                orientation = _orientation(image)
                if orientation in _UPRIGHT:
                    rgb = rgb.transpose(_UPRIGHT[orientation])
            if orientation in _UPRIGHT:
                warnings.append(f"turned upright (EXIF orientation {orientation})")
            return np.asarray(rgb), warnings
    except InvalidImage:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageTooLarge(f"the {name} asks for more memory than is given to one picture") from error
    except Exception as error:  # Pillow's readers raise nearly anything on hostile bytes; nothing of it may pass
        if _ends_early(data, name, error):
            raise TruncatedImage(f"the {name} ends before its picture does") from error
        raise InvalidImage(f"the {name} cannot be decoded: {error}") from error


def _check_size(width: int, height: int, pixels_max: int) -> None:
    if width < 1 or height < 1:
        raise InvalidImage(f"the picture is empty ({width}x{height})")
    if width * height > pixels_max:
        raise ImageTooLarge(
            f"the picture has {width}x{height} = {width * height:,} pixels; at most {pixels_max:,} are read"
        )
    if max(width, height) > SIDE_MAX:
        raise ImageTooLarge(f"the picture is {width}x{height}; a side is at most {SIDE_MAX:,} pixels")


def _ends_early(data: bytes, name: str, error: Exception) -> bool:
    """Whether a failure to decode is the file's being cut: Pillow says so, or the container's own lengths do."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return True
    if name == "PNG":
        return b"IEND" not in data[-16:]
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return False


def _orientation(image: ImageFile) -> int:
    """EXIF orientation; 1 (as stored) where the EXIF is absent or unreadable: metadata never costs a picture."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the EXIF block is hostile bytes too, and Pillow raises nearly anything on them
        return 1
    return value if isinstance(value, int) else 1


def _bits_per_channel(image: ImageFile, data: bytes, name: str) -> int:
    """Bits per channel as the file has them: Pillow reads 16-bit colour as its high byte without saying so."""
    if name == "PNG":
        return data[24]  # IHDR's bit depth: 8 bytes signature, 8 chunk header, 8 width and height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _to_rgb(image: Image.Image, bits: int, warnings: list[str]) -> Image.Image:
    """Bring any of Pillow's modes to RGB, 8 bits, adding to `warnings` what that took."""
    if image.mode.startswith("I;16"):
        return _scale_16_bit(image, warnings)
    if image.mode in ("I", "F"):
        return _scale_32_bit(image, warnings)
    if bits > 8:
        warnings.append(f"{bits}-bit channels scaled to 8 bits")
    if image.has_transparency_data:
        return _over_white(image, warnings)
    if image.mode == "RGB":
        return image.copy()
    if image.mode == "L":
        return image.convert("RGB")
    described = {"1": "1-bit black and white", "P": "palette"}.get(image.mode, image.mode)
    warnings.append(f"{described} converted to RGB")
    return image.convert("RGB")


def _over_white(image: Image.Image, warnings: list[str]) -> Image.Image:
    """Composite over white; a picture opaque everywhere loses nothing by it and gets no warning for that."""
    if image.mode != "RGBA":
        described = {"P": "palette", "PA": "palette with alpha"}.get(image.mode, f"{image.mode} with transparency")
        warnings.append(f"{described} converted to RGB")
    rgba = image.convert("RGBA")
    low, _ = rgba.getchannel("A").getextrema()
    if low == 255:
        return rgba.convert("RGB")
    warnings.append("alpha composited over white")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _scale_16_bit(image: Image.Image, warnings: list[str]) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    warnings.append("16-bit grey scaled to 8 bits")
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255: the whole range on the whole range, rounded
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
        warnings.append("alpha composited over white")
    return Image.fromarray(grey).convert("RGB")


def _scale_32_bit(image: Image.Image, warnings: list[str]) -> Image.Image:
    """Values in [0, 1] are taken as such; wider ones are scaled from their own range, for the format fixes none."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InvalidImage("the picture holds a NaN or an infinity")
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    warnings.append(f"32-bit values from {low:g} to {high:g} scaled to 8 bits")
    grey = np.rint((values - low) * (255.0 / (high - low))).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
