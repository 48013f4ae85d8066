"""Whole slices on their way to a network: the manifest's steps, in memory that is used again.

Fresh memory for each slab costs as much as filling it: the kernel hands out every page as zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.infer.steps import Cast, Clip, PreStep

Array = npt.NDArray[Any]


class Slabs:
    """Makes (slices, 1, rows, columns) of (slices, rows, columns) by ``steps``.

    ``make`` and ``done`` may be called by several threads at a time.
    """

    def __init__(self, steps: Sequence[PreStep]) -> None:
        self._steps = tuple(steps)
        self._spare: deque[Array] = deque()

    def make(self, values: Array) -> Array:
        """C-contiguous, the caller's until it says that it is ``done``."""
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, Cast):
            return np.ascontiguousarray(_through(self._steps, values)[:, np.newaxis])
        slab = self._memory(values.shape, np.dtype(last.dtype))
        *before, clip = self._steps[:-1] or (None,)
        if isinstance(clip, Clip) and last.dtype.startswith("float"):
            values = _through(before, values)
            # numpy converts block by block what it clips, so that nothing in between is written to memory
            np.clip(values, *clip.bounds_for(values.dtype), out=slab[:, 0], casting="same_kind")
        else:
            slab[:, 0] = last.apply(_through(self._steps[:-1], values))
        return slab

    def done(self, slab: Array) -> None:
        """The slab's memory may be used for another one."""
        self._spare.append(slab)

    def _memory(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        while True:
            try:
                spare = self._spare.popleft()
            except IndexError:  # none, or another thread has taken the last one
                break
            if spare.dtype == dtype and spare.shape[2:] == shape[1:] and len(spare) >= shape[0]:
                return spare[: shape[0]]
        return np.empty((shape[0], 1, *shape[1:]), dtype)


def _through(steps: Sequence[PreStep], values: Array) -> Array:
    for step in steps:
        values = step.apply(values)
    return values
