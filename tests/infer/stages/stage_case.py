"""Shared pieces of the tests of the stages: volumes in the patient, sessions in Python, SimpleITK images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import SimpleITK as sitk

from dicomnode.infer.stages.frame import Frame
from dicomnode.infer.volume import Volume


def make_affine(
    axes: np.ndarray | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> np.ndarray:
    """``axes``: columns are the LPS unit directions of array axis 0, 1, 2; (slices, rows, columns) axial by default."""
    affine = np.eye(4)
    directions = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], float).T if axes is None else axes
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def make_volume(values: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    affine = make_affine() if affine is None else affine
    normal = np.cross(affine[:3, 2], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    spacing = (
        abs(float(affine[:3, 0] @ normal)),
        float(np.linalg.norm(affine[:3, 1])),
        float(np.linalg.norm(affine[:3, 2])),
    )
    return Volume(values, affine, spacing, tuple(f"1.2.{i + 1}" for i in range(len(values))))


def make_frame(values: np.ndarray, affine: np.ndarray | None = None) -> Frame:
    return Frame(values, make_affine() if affine is None else affine)


def to_sitk(values: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """The same volume for SimpleITK: its index order is the reverse of the array's."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing([float(s) for s in spacing[::-1]])
    image.SetOrigin([float(v) for v in affine[:3, 3]])
    image.SetDirection((affine[:3, :3] / spacing)[:, ::-1].ravel().tolist())
    return image


def on_grid(image: sitk.Image, frame: Frame, interpolator: int, default: float = 0.0) -> np.ndarray:
    """SimpleITK's resampling of ``image`` onto the grid of ``frame``."""
    reference = to_sitk(np.zeros(frame.shape, np.uint8), frame.affine)
    return sitk.GetArrayFromImage(
        sitk.Resample(image, reference, sitk.Transform(3, sitk.sitkIdentity), interpolator, default, sitk.sitkFloat32)
    )


def phantom(shape: tuple[int, int, int] = (24, 30, 28), seed: int = 0) -> np.ndarray:
    """Smooth int16 values: blurred noise, so that interpolation has something to do."""
    from scipy import ndimage

    noise = np.random.default_rng(seed).standard_normal(shape)
    return np.rint(ndimage.gaussian_filter(noise, 2.0) * 8000).astype(np.int16)


class FakeSession:
    """A network in Python: ``function(input) -> outputs by name``."""

    engine = "fake 1"

    def __init__(self, function: Callable[[np.ndarray], Mapping[str, np.ndarray]], name: str = "x") -> None:
        self.function, self.name = function, name
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        batch = inputs[self.name]
        assert batch.flags.c_contiguous
        self.shapes.append(batch.shape)
        return self.function(batch)

    def close(self) -> None:
        pass


def identity(batch: np.ndarray) -> dict[str, np.ndarray]:
    """Gives back its middle channel."""
    middle = batch.shape[1] // 2
    return {"y": batch[:, middle : middle + 1].copy()}
