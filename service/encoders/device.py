"""Where a network runs and in which numbers: checked before anything is loaded.

Rules:
- The name of a device is torch's ("cpu", "cuda", "cuda:1", "mps"), and it is there when a number can be put on it and
  read back.
- A precision is what the weights are held and multiplied in; vectors are float32 all the same. It changes a model's
  numbers, so it is part of the fingerprint (the tensors' own dtype is hashed with them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import DeviceMissing, InvalidVector

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]


def check_device(name: str) -> str:
    """`name`, when a device of that name is there. Raises `DeviceMissing`. The processor is never asked."""
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch asserts, and raises what each backend raises
        there = ["cpu"]
        there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        first = str(error).strip().splitlines()[0]
        raise DeviceMissing(f"no device {name!r} ({first}); there is {', '.join(there)}") from error
    return name


def torch_dtype(precision: Precision) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def check_finite(vectors: NDArray[np.float32], precision: Precision) -> None:
    """Raises `InvalidVector` naming the item: half precision overflows in some models, and a NaN would never match."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        way_out = {"fp32": "", "fp16": ": it overflows in fp16, use bf16 or fp32", "bf16": ": use fp32"}[precision]
        raise InvalidVector(f"the model's vector of item {wrong[0]} of the batch is not finite{way_out}")
