"""Every normalisation with its warning and its value, every refusal, and hostile bytes."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, PngImagePlugin

from service.encoders.picture import FORMATS, media_type, read_picture, write_png
from service.errors import (
    ImageTooLarge,
    InvalidImage,
    NothingObserved,
    TruncatedImage,
    UnsupportedImageFormat,
)

LOSSLESS = ("PNG", "BMP", "TIFF")


def file_of(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def photograph(height: int = 40, width: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    red, green = 255 * rows / height, 255 * columns / width
    return np.stack([red, green, np.where(rows > columns, 200, 30)], axis=2).astype(np.uint8)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, bits: int, colour_type: int, packed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("format_", FORMATS)
def test_each_accepted_format_is_read(format_: str) -> None:
    pixels = photograph()
    data = file_of(Image.fromarray(pixels), format_, **({"lossless": True} if format_ == "WEBP" else {}))
    picture = read_picture(data)
    assert media_type(data) == f"image/{format_.lower()}"
    assert picture.observed is None
    if format_ in (*LOSSLESS, "WEBP"):
        np.testing.assert_array_equal(picture.pixels, pixels)
        assert picture.warnings == ()
    else:  # JPEG rounds, GIF chooses 256 colours
        assert np.abs(picture.pixels.astype(int) - pixels).mean() < 12


def test_write_png_is_read_back_unchanged() -> None:
    pixels = photograph()
    np.testing.assert_array_equal(read_picture(write_png(pixels)).pixels, pixels)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_turned_by_exif_equals_the_upright_one(format_: str, orientation: int) -> None:
    upright = Image.fromarray(photograph())
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn_back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_, {})
    picture = read_picture(file_of(stored, format_, exif=exif, **quality))
    assert picture.pixels.shape == (40, 60, 3)
    assert np.abs(picture.pixels.astype(int) - photograph()).mean() < 3
    expected = () if orientation == 1 else (f"turned upright (EXIF orientation {orientation})",)
    assert picture.warnings == expected


def test_unreadable_exif_does_not_cost_the_picture() -> None:
    data = file_of(Image.fromarray(photograph()), "PNG", exif=b"Exif\x00\x00no such thing as a TIFF header")
    np.testing.assert_array_equal(read_picture(data).pixels, photograph())


@pytest.mark.parametrize("format_", ["JPEG", "TIFF"])
def test_cmyk_red_stays_red(format_: str) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    picture = read_picture(file_of(red, format_))
    assert picture.warnings == ("CMYK converted to RGB",)
    assert np.abs(picture.pixels.astype(int) - (255, 0, 0)).max() <= 4


def test_palette_becomes_rgb() -> None:
    indexed = Image.new("P", (8, 8), 1)
    indexed.putpalette([0, 0, 0, 10, 200, 30])
    picture = read_picture(file_of(indexed))
    assert picture.warnings == ("palette converted to RGB",)
    assert (picture.pixels == (10, 200, 30)).all()


def test_palette_with_a_transparent_entry_goes_over_white() -> None:
    indexed = Image.new("P", (8, 8), 1)
    indexed.putpalette([0, 0, 0, 10, 200, 30])
    picture = read_picture(file_of(indexed, transparency=1))
    assert picture.warnings == ("palette converted to RGB", "alpha composited over white")
    assert (picture.pixels == 255).all()


def test_one_bit_becomes_black_and_white() -> None:
    bits = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    picture = read_picture(file_of(bits))
    assert picture.warnings == ("1-bit black and white converted to RGB",)
    np.testing.assert_array_equal(picture.pixels[..., 0], np.eye(8) * 255)


def test_plain_grey_is_repeated_with_no_warning() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    picture = read_picture(file_of(Image.fromarray(grey)))
    assert picture.warnings == ()
    np.testing.assert_array_equal(picture.pixels, np.repeat(grey[..., None], 3, axis=2))


def test_alpha_is_composited_over_white() -> None:
    picture = read_picture(file_of(Image.new("RGBA", (4, 4), (0, 0, 0, 51))))
    assert picture.warnings == ("alpha composited over white",)
    assert (picture.pixels == 204).all()


def test_grey_with_alpha_is_composited_over_white() -> None:
    picture = read_picture(file_of(Image.new("LA", (4, 4), (0, 51))))
    assert picture.warnings == ("LA with transparency converted to RGB", "alpha composited over white")
    assert (picture.pixels == 204).all()


def test_opaque_alpha_changes_nothing_and_warns_of_nothing() -> None:
    rgba = Image.fromarray(photograph()).convert("RGBA")
    picture = read_picture(file_of(rgba))
    assert picture.warnings == ()
    np.testing.assert_array_equal(picture.pixels, photograph())


def test_a_colour_key_goes_over_white() -> None:
    pixels = photograph()
    pixels[0, 0] = (1, 2, 3)
    picture = read_picture(file_of(Image.fromarray(pixels), transparency=(1, 2, 3)))
    assert picture.warnings == ("RGB with transparency converted to RGB", "alpha composited over white")
    assert (picture.pixels[0, 0] == 255).all()
    np.testing.assert_array_equal(picture.pixels[1:], pixels[1:])


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_a_16_bit_ramp_stays_a_ramp(format_: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    picture = read_picture(file_of(Image.fromarray(np.tile(ramp, (4, 1))), format_))
    assert picture.warnings == ("16-bit grey scaled to 8 bits",)
    np.testing.assert_array_equal(picture.pixels[0, :, 0], np.arange(256))


def test_a_16_bit_colour_key_goes_over_white() -> None:
    ramp = np.tile(np.array([0, 1000, 65535], dtype=np.uint16), (2, 1))
    picture = read_picture(file_of(Image.fromarray(ramp), transparency=1000))
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [0, 255, 255])
    assert picture.warnings == ("16-bit grey scaled to 8 bits", "alpha composited over white")


def test_16_bit_colour_is_scaled_and_said() -> None:
    ramp = np.linspace(0, 65535, 256).astype(">u2")
    row = b"\x00" + np.repeat(ramp[:, None], 3, axis=1).tobytes()
    picture = read_picture(raw_png(256, 1, 16, 2, zlib.compress(row)))
    assert picture.warnings == ("16-bit channels scaled to 8 bits",)
    np.testing.assert_array_equal(picture.pixels[0, :, 0], np.arange(256))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0), (0.0, 4000.0)])
def test_float_values_are_scaled_from_their_range(low: float, high: float) -> None:
    ramp = np.linspace(low, high, 256, dtype=np.float32)
    picture = read_picture(file_of(Image.fromarray(np.tile(ramp, (2, 1))), "TIFF"))
    assert picture.warnings == (f"32-bit values from {low:g} to {high:g} scaled to 8 bits",)
    np.testing.assert_array_equal(picture.pixels[0, :, 0], np.arange(256))


def test_a_float_picture_with_a_nan_is_refused() -> None:
    values = np.zeros((4, 4), dtype=np.float32)
    values[1, 1] = np.nan
    with pytest.raises(InvalidImage, match="NaN"):
        read_picture(file_of(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_kept(format_: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if format_ == "WEBP" else {}
    picture = read_picture(file_of(frames[0], format_, save_all=True, append_images=frames[1:], **options))
    assert "first frame of several kept" in picture.warnings
    assert (picture.pixels == (250, 0, 0)).all()


def test_the_first_picture_of_a_phones_multi_picture_jpeg_is_read() -> None:
    first, second = Image.fromarray(photograph()), Image.new("RGB", (60, 40), (0, 0, 250))
    data = file_of(first, "MPO", save_all=True, append_images=[second])
    assert media_type(data) == "image/jpeg"
    assert np.abs(read_picture(data).pixels.astype(int) - photograph()).mean() < 12


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (300, 1)])
def test_the_smallest_pictures_are_read(size: tuple[int, int]) -> None:
    picture = read_picture(file_of(Image.new("RGB", size, (9, 8, 7))))
    assert picture.pixels.shape == (size[1], size[0], 3)
    assert (picture.pixels == (9, 8, 7)).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_144_megapixel_png_is_refused_from_its_header() -> None:
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * 12_000)
    packed = b"".join(packer.compress(row) for _ in range(12_000)) + packer.flush()
    data = raw_png(12_000, 12_000, 8, 2, packed)
    assert len(data) < 450_000
    with pytest.raises(ImageTooLarge, match="12000x12000 = 144,000,000 pixels; at most 50,000,000"):
        read_picture(data)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_pixel_limit_is_the_callers(format_: str) -> None:
    data = file_of(Image.new("RGB", (100, 30)), format_)
    assert read_picture(data, pixels_max=3000).pixels.shape == (30, 100, 3)
    with pytest.raises(ImageTooLarge):
        read_picture(data, pixels_max=2999)


def test_a_header_that_promises_more_than_pillows_own_limit_is_too_large() -> None:
    with pytest.raises(ImageTooLarge):
        read_picture(raw_png(200_000, 200_000, 8, 2, zlib.compress(b"")), pixels_max=10**12)


def test_a_very_long_side_is_too_large() -> None:
    with pytest.raises(ImageTooLarge, match="a side is at most"):
        read_picture(file_of(Image.new("L", (40_000, 1))))


def test_a_picture_with_no_pixels_is_refused() -> None:
    with pytest.raises(InvalidImage):
        read_picture(raw_png(0, 5, 8, 2, zlib.compress(b"")))


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused() -> None:
    bomb = png_chunk(b"zTXt", b"comment\x00\x00" + zlib.compress(bytes(100_000_000), 9))
    plain = file_of(Image.new("RGB", (4, 4)))
    with pytest.raises(InvalidImage):
        read_picture(plain[:33] + bomb + plain[33:])


def test_an_ordinary_text_chunk_is_no_reason_to_refuse() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "taken in Siena", zip=True)
    assert read_picture(file_of(Image.new("RGB", (4, 4)), pnginfo=info)).warnings == ()


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_cut_in_its_middle_is_truncated(format_: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), format_)
    with pytest.raises(TruncatedImage, match=f"the {format_} ends"):
        read_picture(data[: len(data) // 2])


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_cut_anywhere_is_refused_or_whole(format_: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), format_)
    whole = read_picture(data).pixels
    for length in range(len(data)):
        try:
            picture = read_picture(data[:length])
        except InvalidImage:
            continue
        # Only what follows the pixels (an end mark, metadata) may be missing.
        np.testing.assert_array_equal(picture.pixels, whole)


@pytest.mark.parametrize(
    "data", [b"", b"a sentence, not a picture", b"\x00" * 100, b"GIF", b"RIFF\x00\x00\x00\x00WAVE"]
)
def test_what_is_no_image_is_invalid_and_the_accepted_formats_are_named(data: bytes) -> None:
    with pytest.raises(InvalidImage, match=r"accepted are PNG, JPEG, WEBP, GIF, BMP, TIFF") as caught:
        read_picture(data)
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (file_of(Image.new("RGB", (16, 16)), "ICO"), "ICO"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'\n<?xml version="1.0"?><svg/>', "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC"),
        (file_of(Image.new("RGB", (16, 16)), "JPEG2000"), "JPEG 2000"),
    ],
)
def test_a_format_off_the_list_is_refused_by_its_name(data: bytes, name: str) -> None:
    for refuse in (read_picture, media_type):
        with pytest.raises(UnsupportedImageFormat, match=rf"{name}.*accepted are PNG"):
            refuse(data)


@given(
    format_=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_damaged_files_give_a_picture_or_our_refusal(
    format_: str, edits: list[tuple[float, int]], cut: float | None
) -> None:
    damaged = bytearray(file_of(Image.fromarray(photograph(9, 11)), format_))
    for where, value in edits:
        damaged[int(where * len(damaged))] = value
    data = bytes(damaged if cut is None else damaged[: int(cut * len(damaged))])
    try:
        picture = read_picture(data, pixels_max=1_000_000)
    except InvalidImage:
        return
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.shape[2] == 3


@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\x00", b"RIFF"]),
    rest=st.binary(),
)
def test_random_bytes_are_refused(start: bytes, rest: bytes) -> None:
    with pytest.raises(InvalidImage):
        read_picture(start + rest)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("white", [1, 255])
def test_white_of_the_mask_is_missing(white: int) -> None:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[:, 30:] = white
    picture = read_picture(file_of(Image.fromarray(photograph())), file_of(Image.fromarray(mask)))
    assert picture.observed is not None
    np.testing.assert_array_equal(picture.observed, mask == 0)
    assert picture.warnings == ()


def test_jpeg_ringing_marks_nothing_as_missing() -> None:
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[:, 32:] = 255
    picture = read_picture(file_of(Image.fromarray(photograph())), file_of(Image.fromarray(mask), "JPEG", quality=60))
    assert picture.observed is not None
    np.testing.assert_array_equal(picture.observed, mask == 0)


def test_a_mask_of_another_size_is_resized_and_said() -> None:
    mask = np.array([[0, 255]], dtype=np.uint8)
    picture = read_picture(file_of(Image.fromarray(photograph())), file_of(Image.fromarray(mask)))
    assert picture.warnings == ("mask resized from 2x1 to the picture's 60x40",)
    assert picture.observed is not None
    assert picture.observed[:, :30].all()
    assert not picture.observed[:, 30:].any()


def test_a_mask_applies_to_the_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(photograph()).transpose(Image.Transpose.ROTATE_90)
    mask = Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 60, 10))
    picture = read_picture(file_of(stored, exif=exif), file_of(mask))
    assert picture.observed is not None
    assert not picture.observed[:10].any()
    assert picture.observed[10:].all()


def test_a_black_mask_hides_nothing_and_a_white_one_everything() -> None:
    data = file_of(Image.fromarray(photograph()))
    assert read_picture(data, file_of(Image.new("L", (60, 40), 0))).observed is None
    with pytest.raises(NothingObserved):
        read_picture(data, file_of(Image.new("L", (60, 40), 255)))


def test_a_bad_mask_is_refused_as_the_mask() -> None:
    with pytest.raises(UnsupportedImageFormat, match=r"^mask: PDF"):
        read_picture(file_of(Image.fromarray(photograph())), b"%PDF-1.7")


def test_many_threads_read_at_once() -> None:
    files = [
        file_of(ImageChops.offset(Image.fromarray(photograph()), shift), format_)
        for shift in range(10)
        for format_ in FORMATS
    ]
    alone = [read_picture(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(read_picture, files * 4))
    for i, picture in enumerate(together):
        np.testing.assert_array_equal(picture.pixels, alone[i % len(files)].pixels)
        assert picture.warnings == alone[i % len(files)].warnings
