"""The models that are measured, each with a volume of the size that it is meant for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks import graphs
from benchmarks.tools import ROOT, SHARED_DATA, Bench, say
from dicomnode.demo.phantom import thorax
from dicomnode.infer.bundle import Bundle, load_bundle
from dicomnode.infer.contract import InputContract
from dicomnode.infer.decode import PoolDecoder
from dicomnode.infer.golden import model_file
from dicomnode.infer.volume import Volume, read_volume

REAL_CT = SHARED_DATA / "ct-chest-ricord"
LUNGS = ("ct-lung", "ct-lung-unet")


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    bundle: Bundle
    volume: Volume

    def onnx(self, *, half: bool = False) -> bytes:
        name = "fp16mixed.onnx" if half else model_file(self.bundle)
        assert name is not None
        return self.bundle.read(name)

    @property
    def has_half(self) -> bool:
        return "fp16mixed.onnx" in self.bundle.manifest.files


def cores() -> int:
    return os.cpu_count() or 1


def chest(bench: Bench) -> tuple[Volume, str]:
    """The real chest CT where it is, else a phantom; and what it is."""
    bundle = load_bundle(ROOT / "models" / "ct-lung" / "1.0.0")
    files = sorted(REAL_CT.glob("*.dcm"))
    if files and not bench.quick:
        contract = bundle.manifest.input
        assert isinstance(contract, InputContract)
        with PoolDecoder(cores()) as decoder:
            return read_volume(files, contract, decoder=decoder), f"real chest CT, {len(files)} slices"
    slices, matrix = bench.amount(248, 40), bench.amount(512, 128)
    say.print(f"making a phantom of {slices} slices …")
    made = thorax(
        slices=slices, rows=matrix, columns=matrix, pixel_spacing=358.4 / matrix, slice_spacing=320.0 / slices
    )
    return volume_of(made.hu, made.spacing), f"phantom, {slices} slices"


def volume_of(hu: npt.NDArray[np.int16], spacing: tuple[float, float, float]) -> Volume:
    """An axial head-first stack around the origin."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *spacing, 1.0
    return Volume(hu, affine, spacing, tuple(f"2.25.{i + 1}" for i in range(len(hu))))


def part(volume: Volume, shape: tuple[int, int, int]) -> Volume:
    """The middle of a volume, at most ``shape``."""
    box = tuple(
        slice((n - min(n, wanted)) // 2, (n - min(n, wanted)) // 2 + min(n, wanted))
        for n, wanted in zip(volume.values.shape, shape, strict=True)
    )
    values = np.ascontiguousarray(volume.values[box])
    return replace(volume, values=values, source_uids=volume.source_uids[box[0]], source_frames=())


def shipped(bench: Bench, volume: Volume) -> list[Subject]:
    """The bundles for lungs that are here."""
    found = []
    for name in LUNGS:
        path = ROOT / "models" / name / "1.0.0"
        if path.is_dir():
            found.append(Subject(name, load_bundle(path), volume))
        else:
            bench.skip(f"{name}: its bundle is not here")
    return found


def random_ones(bench: Bench, volume: Volume) -> list[Subject]:
    """The networks with random weights, built now, on parts of the volume that bound their time."""
    try:
        paths = graphs.write_bundles(bench.folder("graphs"))
    except ImportError as error:
        bench.skip(f"{graphs.UNET3D} and {graphs.DENSENET}: {error}")
        return []
    sizes = {
        graphs.UNET3D: (64, bench.amount(160, 64), bench.amount(160, 64)),
        graphs.DENSENET: (bench.amount(32, 8), 512, 512),
    }
    return [Subject(name, load_bundle(path), part(volume, sizes[name])) for name, path in paths.items()]
