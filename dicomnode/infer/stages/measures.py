"""Measurements of segments: those of schema 1 and spread, percentiles, shares, diameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from dicomnode.infer.contract import Strict
from dicomnode.infer.measure import FractionBelowSpec, MeanSpec, VolumeSpec, measure

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]


class FractionAboveSpec(Strict):
    """Share of the segment's voxels with a value strictly above ``threshold``, in percent."""

    kind: Literal["percent_above"]
    threshold: float


class StandardDeviationSpec(Strict):
    """Population standard deviation of the values inside the segment, in their own unit."""

    kind: Literal["standard_deviation"]


class PercentileSpec(Strict):
    """Value below which ``percentile`` percent of the segment's voxels lie (numpy's default, type 7)."""

    kind: Literal["percentile"]
    percentile: float = Field(ge=0, le=100)


class DiameterSpec(Strict):
    """Longest diameter within one slice, in mm: of one connected piece (8-neighbourhood).

    The largest distance between the centres of two voxels of the piece: the longest diameter
    in the plane of acquisition that RECIST 1.1 (Eisenhauer 2009) measures, on the voxel grid.
    """

    kind: Literal["diameter_in_plane_mm"]


class FeretSpec(Strict):
    """Largest distance between the centres of two voxels of the segment, in mm, in 3-D.

    Maximum Feret diameter as ITK's LabelShapeStatistics has it (Lehmann, Insight Journal
    2007). ``largest_only``: of the segment's largest piece (6-neighbourhood).
    """

    kind: Literal["feret_mm"]
    largest_only: bool = False


class AreaSpec(Strict):
    """Number of pixels times the area of one, in mm2: of a segment of a single image."""

    kind: Literal["area_mm2"]


MeasureSpec = Annotated[
    VolumeSpec
    | AreaSpec
    | MeanSpec
    | FractionBelowSpec
    | FractionAboveSpec
    | StandardDeviationSpec
    | PercentileSpec
    | DiameterSpec
    | FeretSpec,
    Field(discriminator="kind"),
]


def measure_segment(spec: MeasureSpec, values: npt.NDArray[Any], mask: Mask, affine: Points) -> float:
    """One number of the segment ``mask`` in ``values``, both of one shape.

    ``affine``: index to LPS mm; also right for a tilted gantry, whose columns are not at
    right angles. Raises ValueError for an empty mask, but for its volume or area, which is 0.
    """
    if isinstance(spec, DiameterSpec):
        return diameter_in_plane(mask, affine)
    if isinstance(spec, FeretSpec):
        return feret(_largest(mask) if spec.largest_only else mask, affine)
    if isinstance(spec, AreaSpec):
        return int(np.count_nonzero(mask)) * float(np.linalg.norm(np.cross(affine[:3, 1], affine[:3, 2])))
    inside = values[mask]
    if inside.size == 0 and not isinstance(spec, VolumeSpec):
        raise ValueError("a segment without voxels has no measurements")
    if isinstance(spec, FractionAboveSpec):
        return 100.0 * int(np.count_nonzero(inside > spec.threshold)) / inside.size
    if isinstance(spec, StandardDeviationSpec):
        return float(np.std(inside, dtype=np.float64))
    if isinstance(spec, PercentileSpec):
        return float(np.percentile(inside, spec.percentile))
    return measure(spec, inside, abs(float(np.linalg.det(affine[:3, :3]))) / 1000.0)


def diameter_in_plane(mask: Mask, affine: Points) -> float:
    """See DiameterSpec. Pieces are tried from the largest box down; small ones are skipped unmeasured."""
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = True
    pieces, found = ndimage.label(mask, plane)
    if not found:
        raise ValueError("a segment without voxels has no measurements")
    boxes = ndimage.find_objects(pieces)
    ends = np.array([[box[1].stop - box[1].start - 1, box[2].stop - box[2].start - 1] for box in boxes], float)
    rows, columns = affine[:3, 1], affine[:3, 2]
    reach = np.maximum(
        np.linalg.norm(ends[:, :1] * rows + ends[:, 1:] * columns, axis=1),
        np.linalg.norm(ends[:, :1] * rows - ends[:, 1:] * columns, axis=1),
    )
    best = 0.0
    for index in np.argsort(-reach, kind="stable"):
        if reach[index] <= best:
            break
        best = max(best, feret(pieces[boxes[index]] == index + 1, affine))
    return best


def feret(mask: Mask, affine: Points) -> float:
    """See FeretSpec: the largest distance between corners of the convex hull."""
    points = _row_ends(mask) @ affine[:3, :3].T
    if len(points) == 0:
        raise ValueError("a segment without voxels has no measurements")
    corners = _corners(points)
    return float(pdist(corners).max()) if len(corners) > 1 else 0.0


def _row_ends(mask: Mask) -> Points:
    """First and last voxel of each row: every corner of the convex hull is one of them."""
    slices, rows = np.nonzero(mask.any(axis=2))
    lines = mask[slices, rows]
    first = lines.argmax(axis=1)
    last = lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
    both = [np.stack([slices, rows, ends], axis=1) for ends in (first, last)]
    return np.concatenate(both).astype(np.float64)


def _corners(points: Points) -> Points:
    """Corners of the convex hull, in as many dimensions as the points span."""
    centred = points - points.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    rank = int(np.sum(sizes > 1e-6 * max(float(sizes[0]), 1e-12))) if len(points) > 1 else 0
    if rank <= 1:
        along = centred @ axes[0]
        return points[[int(along.argmin()), int(along.argmax())]] if rank else points[:1]
    try:
        return np.asarray(points[ConvexHull(centred @ axes[:rank].T).vertices])
    except QhullError:
        return points


def _largest(mask: Mask) -> Mask:
    pieces, _ = ndimage.label(mask)
    counts = np.bincount(pieces.ravel())
    counts[0] = 0
    return np.asarray(mask & (pieces == int(counts.argmax())))
