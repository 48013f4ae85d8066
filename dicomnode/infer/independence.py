"""Whether rows of a batch are independent of each other, on the engine that will compute them.

A manifest promises it, but a graph can break the promise without any error: statistics over the batch, a
softmax over axis 0, a reshape that mixes it. As long as a batch holds one patient that costs accuracy; in
a batch of several it would let one patient's image change another's result. So it is measured before
batches are shared, with the bundle's own golden input, and a graph that is known to do so is not tried.
"""

from __future__ import annotations

import numpy as np

from dicomnode.errors import EngineError
from dicomnode.infer.batching import Arrays
from dicomnode.infer.begun import halves
from dicomnode.infer.bundle import Bundle
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.engine import Session
from dicomnode.infer.faults import Fault, fault_of
from dicomnode.infer.joint import call_of
from dicomnode.infer.onnxcheck import operators
from dicomnode.infer.stages.golden import case_volume
from dicomnode.infer.stages.run import begin_staged

TOLERANCE = 0.01
"""Of the spread of an output: what engines round otherwise for another length of the batch is far less
(TF32 about 1e-3), and it is the tolerance of probabilities at the golden gate."""


ROWS = 3
"""Of the batch that is tried."""

OF_ALL_ROWS = frozenset({"DynamicQuantizeLinear"})
"""Operators by which the brightest row of a batch sets the steps of all others: 8 bits with a scale of the moment.
Rows that are much alike, as the golden ones may be, do not show it."""


def rows_independent(bundle: Bundle, session: Session) -> bool:
    """Whether studies may share batches of ``session``.

    False for a bundle whose analyses do not come in two halves, and where the network cannot take more
    rows than one. Raises EngineError for a lost device, and PeerAway.
    """
    manifest = halves(bundle.manifest)
    if manifest is None or manifest.engine is None or getattr(session, "batch", 1) < 2:
        return False
    if operators(bundle.read(manifest.engine.model), manifest.engine.model) & OF_ALL_ROWS:
        return False
    case = manifest.golden[0]
    displayed = isinstance(manifest.input, ProjectionContract) and manifest.input.values == "displayed"
    more = {name: case_volume(one, bundle.read) for name, one in case.more.items()}
    call = begin_staged(manifest, case_volume(case, bundle.read, displayed=displayed), more=more).calls[0]
    if not call_of(call).rows:
        return False
    rows = [_row(call, turned, share) for turned, share in ((False, 1.0), (True, 0.5), (False, 0.25))]
    try:
        joint = session.run({name: np.concatenate([row[name] for row in rows]) for name in call})
        return all(_same(joint, at, session.run(row)) for at, row in enumerate(rows))
    except EngineError as error:
        if fault_of(error.code) is Fault.lost:
            raise
        return False


def _row(call: Arrays, turned: bool, share: float) -> Arrays:
    """The first row of a call, mirrored or not and of a share of its brightness: another one, of the same kind."""
    first = {name: np.flip(a[:1], -1) if turned else a[:1] for name, a in call.items()}
    return {name: np.ascontiguousarray(a * a.dtype.type(share)) for name, a in first.items()}


def _same(joint: Arrays, row: int, alone: Arrays) -> bool:
    """Whether one row of the batch has what it has alone. Pure."""
    if joint.keys() != alone.keys():
        return False
    for name, wanted in alone.items():
        got = joint[name]
        if got.ndim == 0 or len(got) != ROWS or got.shape[1:] != wanted.shape[1:] or len(wanted) != 1:
            return False
        a, b = got[row].astype(np.float64), wanted[0].astype(np.float64)
        if not a.size:
            return False
        spread = max(float(np.ptp(b)), float(np.abs(b).max()), 1e-6)
        if not float(np.abs(a - b).max()) <= TOLERANCE * spread:  # NaN is no agreement
            return False
    return True
