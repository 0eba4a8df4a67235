"""What of a masked picture a whole-picture network is shown.

Such networks know no mask. Cropping to what is observed shows the least that is made up; what is hidden inside the crop
gets the observed mean colour, the constant that is nearest to the picture. So hidden pixels have no influence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from service.encoders.protocol import Picture
from service.errors import NothingObserved


def visible_part(picture: Picture) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: the bounding box of the observed pixels, the hidden ones in it filled. Raises
    `NothingObserved`.
    """
    if picture.observed is None:
        return picture.pixels
    rows, columns = np.flatnonzero(picture.observed.any(axis=1)), np.flatnonzero(picture.observed.any(axis=0))
    if not len(rows):
        raise NothingObserved("the mask marks the whole picture as missing")
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels, observed = picture.pixels[box].copy(), picture.observed[box]
    pixels[~observed] = np.rint(pixels[observed].mean(axis=0)).astype(np.uint8)
    return pixels
