"""A series into a volume, against decoding alone on all cores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Figures, Goal, Section
from benchmarks.tools import SHARED_DATA, Bench, Samples, Skipped, say
from dicomnode.infer.contract import InputContract
from dicomnode.infer.decode import PoolDecoder
from dicomnode.infer.volume import read_volume

REAL_CT = SHARED_DATA / "ct-chest-ricord"
LIMIT = 1.2
EVERYTHING = InputContract(
    modality="CT",
    sop_classes=("1.2.840.10008.5.1.4.1.1.2",),
    min_slices=2,
    slice_spacing_mm=(0.1, 20.0),
    pixel_spacing_mm=(0.1, 5.0),
    hounsfield=True,
)


def run(bench: Bench) -> Section:
    files = sorted(REAL_CT.glob("*.dcm"))
    if not files:
        raise Skipped("the real chest CT is not here")
    cores = os.cpu_count() or 1
    reading, decoding = Samples(), Samples()
    with PoolDecoder(cores) as decoder:
        decoder.warm_up()
        for turn in range(bench.repeat):
            say.print(f"reading {turn + 1}/{bench.repeat} …")
            decoding.add(_decode(decoder, files))
            reading.add(_read(decoder, files))
    times = reading.best / decoding.best
    rows = [
        {"what": "decoding alone", "s": f"{decoding.best:.2f}", "ratio": "1.00x"},
        {"what": "headers, checks, decoding, volume in HU", "s": f"{reading.best:.2f}", "ratio": f"{times:.2f}x"},
    ]
    note = f"{len(files)} slices, JPEG Lossless, {cores} processes that were warm; best of {bench.repeat}."
    section = Section([Figures("Reading a series into a volume", rows, note)])
    section.goals.append(Goal("series into a volume", f"within {LIMIT}x of decoding", f"{times:.2f}x", times <= LIMIT))
    section.samples = {"decoding": decoding.as_json(), "reading": reading.as_json()}
    return section


def _contents(files: list[Path]) -> Iterator[tuple[bytes, int, int]]:
    for path in files:
        yield path.read_bytes(), 512, 512


def _decode(decoder: PoolDecoder, files: list[Path]) -> float:
    begin = time.perf_counter()
    count = sum(1 for _ in decoder.frames(_contents(files)))
    if count != len(files):
        raise AssertionError("the decoder left slices out")
    return time.perf_counter() - begin


def _read(decoder: PoolDecoder, files: list[Path]) -> float:
    begin = time.perf_counter()
    volume = read_volume(files, EVERYTHING, decoder=decoder)
    if len(volume.source_uids) != len(files):
        raise AssertionError("the volume lacks slices")
    return time.perf_counter() - begin
