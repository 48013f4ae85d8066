"""Dice of ct-lung-unet: against ct-lung on a real series, against the known truth on phantoms.

Usage: ``python scripts/measure_ct_lung_unet.py [--series FOLDER]`` (default: the real chest CT of
the test data). The numbers of the model card come from here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dicomnode.demo.phantom import thorax  # noqa: E402
from dicomnode.infer.bundle import Bundle, load_bundle  # noqa: E402
from dicomnode.infer.engine import Session  # noqa: E402
from dicomnode.infer.golden import session_for  # noqa: E402
from dicomnode.infer.ort import OnnxRuntimeCpu  # noqa: E402
from dicomnode.infer.pipeline import run_bundle  # noqa: E402
from dicomnode.infer.volume import Volume, read_volume  # noqa: E402
from dicomnode.records import Analysis  # noqa: E402

Labels = npt.NDArray[np.uint8]
SIDES = {1: "Right lung", 2: "Left lung"}
REAL_CT = ROOT.parent / "shared" / "data" / "ct-chest-ricord"


def by_side(analysis: Analysis) -> Labels:
    """1 right, 2 left, whatever the numbers of the result."""
    assert analysis.labels is not None
    table = np.zeros(256, np.uint8)
    for segment in analysis.segments:
        table[segment.number] = next(n for n, label in SIDES.items() if label == segment.label)
    return np.asarray(table[analysis.labels])


def dice(a: Labels, b: Labels) -> dict[int, float]:
    """By side; 1.0 where neither has any."""
    out = {}
    for side in SIDES:
        total = int((a == side).sum()) + int((b == side).sum())
        out[side] = 2 * int(((a == side) & (b == side)).sum()) / total if total else 1.0
    return out


def opened(name: str) -> tuple[Bundle, Session]:
    bundle = load_bundle(ROOT / "models" / name / "1.0.0")
    return bundle, session_for(bundle, OnnxRuntimeCpu(), 0)


def timed(model: tuple[Bundle, Session], volume: Volume) -> tuple[Labels, Analysis, float]:
    begin = time.perf_counter()
    analysis = run_bundle(*model, volume)
    return by_side(analysis), analysis, time.perf_counter() - begin


def phantom_volume(slices: int, matrix: int, pixel: float, step: float, seed: int) -> tuple[Volume, Labels]:
    made = thorax(slices=slices, rows=matrix, columns=matrix, pixel_spacing=pixel, slice_spacing=step, seed=seed)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = step, pixel, pixel, 1.0
    uids = tuple(str(i) for i in range(slices))
    return Volume(made.hu, affine, (step, pixel, pixel), uids), made.labels


def told(what: str, found: dict[int, float]) -> None:
    print(f"{what}: Dice right {found[1]:.4f}, left {found[2]:.4f}")


def main(series: Path) -> None:
    unet, density = opened("ct-lung-unet"), opened("ct-lung")
    for seed, (slices, matrix, pixel, step) in enumerate([(128, 512, 0.7, 2.5), (64, 256, 1.4, 5.0)], start=101):
        volume, truth = phantom_volume(slices, matrix, pixel, step, seed)
        what = f"thorax phantom {slices} x {matrix} x {matrix}, seed {seed}"
        told(f"{what}, ct-lung-unet against the truth", dice(timed(unet, volume)[0], truth))
        told(f"{what}, ct-lung against the truth", dice(timed(density, volume)[0], truth))
    files = sorted(series.glob("*.dcm"))
    if not files:
        print(f"no series in {series}: left out")
        return
    volume = read_volume(files, unet[0].manifest.input)
    ours, analysis, seconds = timed(unet, volume)
    theirs, other, other_seconds = timed(density, volume)
    told(f"{len(files)} real slices, ct-lung-unet against ct-lung", dice(ours, theirs))
    for name, found, took in (("ct-lung-unet", analysis, seconds), ("ct-lung", other, other_seconds)):
        labels = {s.number: s.label for s in found.segments}
        values = ", ".join(f"{labels[m.segment or 0]} {m.key} {m.value:.1f}" for m in found.measurements)
        print(f"  {name}: {values}; {took:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in found.seconds.items())})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Dice of ct-lung-unet on phantoms and on a real series.")
    parser.add_argument("--series", type=Path, default=REAL_CT, help="folder with one chest CT")
    main(parser.parse_args().series)
