"""What a bank keeps for a learned kernel: per row 1/‖Wξ‖, and, where a graph is built on it, the keys Wξ/‖Wξ‖.

Strategy: ⟨Wξ, Wx⟩ = ⟨ξ, WᵀWx⟩, so a scan needs no rows but those it has: the cue carries the kernel, and one number per
row makes a cosine of it. Only a graph compares stored rows with each other and needs keys.

Rules:
- Rows are unit rows û, as a bank keeps them under cosine, and the number kept is 1/‖Wû‖.
- A row that W all but annihilates (`KERNEL_NULL`) has no direction left: its number is 0, and under this kernel it
  lacks the space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from service.core.similarity import KERNEL_NULL, Kernel

Named = tuple[str, Kernel]
"""A kernel and the space that it is for."""

CHUNK_VALUES_MAX = 2**22
"""Values of rows or of their images at once: 16 MB of float32, past which a product of matrices gets no faster."""


class Projection:
    """A kernel made ready: W on the bank's device, and the ‖Wû‖ under which a row is in its null space."""

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self.weight = kernel.weight.detach().to(device, torch.float32).contiguous()
        self.null_length = KERNEL_NULL * float(torch.linalg.matrix_norm(self.weight))

    def inverse_lengths(self, image: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        """1/‖Wû‖ of images Wû; 0 in the null space."""
        length: Tensor = torch.linalg.vector_norm(image, dim=1, dtype=torch.float64)
        inverse: Tensor = length.reciprocal().masked_fill(length <= self.null_length, 0.0)
        return inverse.to(torch.float32)

    def images(self, unit: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        """Wû."""
        return unit @ self.weight.T

    def keys(self, unit: Float[Tensor, "n d"], inverse: Float[Tensor, " n"]) -> Float[Tensor, "n r"]:
        """Wû/‖Wû‖, with `inverse` from `inverse_lengths`."""
        keys = unit.new_empty(len(unit), len(self.weight))
        for start in range(0, len(unit), self.chunk):
            some = slice(start, start + self.chunk)
            torch.mul(self.images(unit[some]), inverse[some, None], out=keys[some])
        return keys

    @property
    def chunk(self) -> int:
        """Rows at once."""
        return max(1, CHUNK_VALUES_MAX // max(self.weight.shape))


@dataclass(frozen=True, eq=False)
class Scales:
    """1/‖Wû‖ of a segment's first `count` rows, in a buffer that may be longer: `lacking` of them are 0, `largest` is
    the largest.
    """

    inverse: Float[Tensor, " capacity"]
    count: int = 0
    lacking: int = 0
    largest: float = 0.0

    def appended(self, inverse: Float[Tensor, " n"], capacity: int) -> Scales:
        """With more rows. The buffer is shared where it is long enough, so only the newest of a line is appended to."""
        start, stop = self.count, self.count + len(inverse)
        if stop == start:
            return self
        buffer = self.inverse
        if len(buffer) < stop:
            buffer = torch.zeros(max(stop, capacity), device=buffer.device)
            buffer[:start] = self.inverse[:start]
        buffer[start:stop] = inverse
        return Scales(buffer, stop, self.lacking + int((inverse == 0).sum()), max(self.largest, float(inverse.max())))

    def up_to(self, unit: Float[Tensor, "n d"], projection: Projection, capacity: int) -> Scales:
        """With all of these rows, of which the first `count` are known."""
        scales = self
        for start in range(self.count, len(unit), projection.chunk):
            image = projection.images(unit[start : start + projection.chunk])
            scales = scales.appended(projection.inverse_lengths(image), capacity)
        return scales
