"""Fixtures: a series on disk with an analysis of it, and the judgement of other programs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.records import Analysis, Code, Measurement, SourceInstance
from tests.encode.encode_case import (
    AXIAL,
    MILLILITRE,
    SEGMENTS,
    SHARED_DATA,
    VOLUME,
    Case,
    blobs,
    identity,
    program,
    slice_dataset,
)

Change = Callable[[Dataset, int], None]


@pytest.fixture
def make_case(tmp_path: Path) -> Callable[..., Case]:
    """Builds a series of ``count`` slices, stored in scanner order, and an analysis of it."""

    def make(
        orientation: Sequence[float] = AXIAL,
        *,
        count: int = 8,
        flipped: bool = False,
        change: Change | None = None,
        revision: int = 1,
        extra: int = 0,
    ) -> Case:
        datasets = [slice_dataset(i, orientation) for i in range(count + extra)]
        for number, ds in enumerate(datasets):
            if change:
                change(ds, number)
            ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        sources = [
            SourceInstance(
                str(ds.SOPInstanceUID),
                str(ds.SOPClassUID),
                str(ExplicitVRLittleEndian),
                tmp_path / f"{i}.dcm",
                "0" * 64,
            )
            for i, ds in enumerate(datasets)
        ]
        used = datasets[:count]
        if flipped:
            used.reverse()
            sources.reverse()
        analysis = Analysis(
            labels=blobs(count),
            source_uids=tuple(str(ds.SOPInstanceUID) for ds in used),
            segments=SEGMENTS,
            measurements=(
                Measurement("volume_ml", VOLUME, 1234.5678901234, MILLILITRE, 1),
                Measurement("volume_ml", VOLUME, 0.000123456789, MILLILITRE, 2),
                Measurement("total_ml", VOLUME, 1234.568, MILLILITRE, None, Code("255619001", "SCT", "Total")),
            ),
            notes=("1 instance was left out: it is a localizer.",) if extra else (),
            excluded_uids=tuple(s.sop_instance_uid for s in sources if s.sop_instance_uid not in
                                {str(ds.SOPInstanceUID) for ds in used}),
            engine="onnxruntime-cpu 1.32.0",
            seconds={"read": 1.5},
        )  # fmt: skip
        return Case(analysis, identity(revision), tuple(sources), datasets=tuple(used))

    return make


@pytest.fixture
def real_ct() -> list[Path]:
    """The real chest CT beside the project, which is not part of it."""
    files = sorted((SHARED_DATA / "ct-chest-ricord").glob("*.dcm"))
    if not files:
        pytest.skip("no real CT: ../shared/data/ct-chest-ricord is absent")
    return files


@pytest.fixture
def assert_valid(tmp_path: Path) -> Callable[[bytes], None]:
    """dciodvfy's verdict: no line that begins with Error."""

    def check(part10: bytes) -> None:
        path = tmp_path / "object.dcm"
        path.write_bytes(part10)
        done = subprocess.run([program("dciodvfy"), "-new", path], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert any(line in {"Segmentation", "Comprehensive3DSR"} for line in lines), lines
        assert [line for line in lines if line.startswith("Error")] == []

    return check


@pytest.fixture
def dump_report(tmp_path: Path) -> Callable[[bytes], str]:
    """The report as DCMTK's dsrdump prints it, with codes and long texts."""

    def dump(part10: bytes) -> str:
        path = tmp_path / "report.dcm"
        path.write_bytes(part10)
        command = [program("dsrdump"), "+Pl", "+Pc", "+U8", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return dump
