"""Pictures as they are sent: the bytes of a file, whatever a caller has them as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram.transport import Body
from service.errors import InvalidImage, NotFound

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike = str | Path | bytes | Image | NDArray[np.uint8] | NDArray[np.bool_]

CONVERTED = {
    "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "La": "LA", "PA": "RGBA", "RGBa": "RGBA",
}  # colour modes of Pillow's that PNG does not have  # fmt: skip
WIDE_MODES = ("I", "F", "I;16L")  # nor these: they go as TIFF, and the engine scales them to 8 bits as in any file


def sent_image(image: ImageLike) -> Body:
    if isinstance(image, bytes):
        return {"base64": image}
    if isinstance(image, str | Path):
        try:
            return {"base64": Path(image).read_bytes()}
        except FileNotFoundError:
            raise NotFound(f"there is no file {image}") from None
        except OSError as error:
            raise InvalidImage(f"{image}: {error.strerror}") from None
    from PIL import Image  # only pictures that are not files need it

    if isinstance(image, np.ndarray):
        drawn = Image.fromarray(_pixels(image))
    elif isinstance(image, Image.Image):
        drawn = image
    else:
        raise InvalidImage(f"an image is a path, bytes, a Pillow image or an array, not {type(image).__name__}")
    file = io.BytesIO()
    try:
        if drawn.mode in CONVERTED:
            drawn = drawn.convert(CONVERTED[drawn.mode])
        drawn.save(file, "TIFF" if drawn.mode in WIDE_MODES else "PNG")
    except Exception as error:  # Pillow may read the picture's file only now, and raises nearly anything on a bad one
        what = f"a Pillow image, {drawn.mode} of {drawn.width}x{drawn.height}"
        raise InvalidImage(f"{what}, cannot be made a file: {error}") from error
    return {"base64": file.getvalue()}


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 2, 3, 4))
    if array.dtype not in (np.uint8, np.bool_) or not shaped or not array.size:
        raise InvalidImage(
            f"an array of {array.dtype} and shape {array.shape} is not a picture: uint8 or bool, and (height, width) "
            "or (height, width, 1 to 4 channels), none of them 0, is one"
        )
    pixels = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
