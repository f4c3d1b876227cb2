"""What becomes of an exception in one contestant: a line of text, and an end where the GPU is lost.

Out of memory, a kernel that needs more shared memory than there is, an error in a compiler: the
contestant has no time, all others do. After an illegal address no call on the GPU works any more.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("benchmarks")


class Broken(RuntimeError):
    """The device answers no call any more: nothing further can be measured in this process."""


def describe(error: Exception, device: torch.device) -> str:
    """ "Type: first line" of an error that the device survived; else raises Broken with it."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first}".removesuffix(": ")
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise Broken(text) from error
    logger.warning("a contestant failed: %s", text, exc_info=error)
    return text
