"""Runs a model over many items, in batches that fit in memory.

Strategy: batches of the size that the encoder asks for; where one does not fit, half of it, and half again, and what
fitted is kept for the rest of the call. An item that does not fit alone is `OutOfMemory`.

Rules:
- The failed attempt's tensors are let go before the next attempt: it runs outside of the `except` block, whose
  traceback holds them.
- torch raises a class of its own on accelerators and a plain RuntimeError on a CPU, onnxruntime one of its own again:
  the message decides, and no model library is imported.
"""

from __future__ import annotations

from collections.abc import Callable

from service.errors import OutOfMemory

_SAID = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate", "alloc_failed")
"""torch's CPU allocator, CUDA, MPS, cuBLAS and cuDNN, and onnxruntime, in lower case."""


def run_batches(count: int, at_once: int, run: Callable[[slice], None]) -> None:
    """Call `run` on slices that cover 0 … count, of at most `at_once` items, in order; a slice may come again, shorter.

    Raises `OutOfMemory` when one item alone does not fit, and whatever else `run` raises.
    """
    start = 0
    while start < count:
        stop = min(start + at_once, count)
        if _fits(run, slice(start, stop)):
            start = stop
        elif stop - start == 1:
            raise OutOfMemory("the model has no memory left for a single item")
        else:
            at_once = (stop - start) // 2


def _fits(run: Callable[[slice], None], part: slice) -> bool:
    try:
        run(part)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of numpy, torch or onnxruntime says that memory ran out."""
    return isinstance(error, MemoryError) or any(said in str(error).lower() for said in _SAID)
