"""A whole node as a subprocess, and series to send to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import apsw
import numpy as np
import psutil
import pydicom
from pydicom.uid import generate_uid

from dicomnode.demo.phantom import EXAMPLE_TIME, Phantom, thorax, to_datasets
from dicomnode.index.database import rows_of
from dicomnode.receive.progress import wait_until_visible
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, Item, Process, free_port, wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
CANARY = "Xylocanary"
"""Family name of every patient that these tests send; it may stand in no log (Node.stop looks)."""

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SLICES = 32


def python_environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {"PYTHONPATH": path, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "2"}


def toml(value: Any) -> str:
    """A TOML value; dictionaries become inline tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def rule(
    name: str,
    match: dict[str, Any],
    *,
    to: Sequence[str] = (),
    priority: str = "routine",
    model: str = "ct-lung",
) -> dict[str, Any]:
    return {"name": name, "match": match, "models": [model], "priority": priority, "send_to": list(to)}


class Node:
    """``serve``, or one process of the node, on a data folder of its own.

    ``sections`` are merged over short defaults: ``Node(folder, completeness={...})``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        peers: Sequence[dict[str, Any]] = (),
        rules: Sequence[dict[str, Any]] = (),
        data_dir: Path | None = None,
        **sections: dict[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data_dir = data_dir or folder / "data"
        self.port = free_port()
        self.http_port = free_port()
        self.config = folder / "node.toml"
        self.log = folder / "node.log"
        self.workers = int(sections.get("dimse", {}).get("workers", 2))
        self.environment: dict[str, str] = {}
        """Further variables for the processes that :meth:`start` starts."""
        self._process: Process | None = None
        self._verb = "serve"
        self._db: apsw.Connection | None = None
        self.visible_seconds = 10.0
        self.looks_at_copies = False
        """Of the index: who opens it in its place may be the one who makes its log."""
        merged: dict[str, dict[str, Any]] = {
            "node": {"ae_title": "DICOMNODE", "data_dir": self.data_dir, "reserve_mb": 1},
            "dimse": {"host": "127.0.0.1", "port": self.port, "workers": 2},
            "http": {"host": "127.0.0.1", "port": self.http_port},
            "completeness": {"quiet_seconds": 2},
            "inference": {"engine": "onnxruntime-cpu", "models_dir": ROOT / "models"},
            "delivery": {"backoff_seconds": 0.2, "backoff_max_seconds": 1, "response_seconds": 20},
            "logging": {"level": "debug", "format": "json"},
        }
        for name, keys in sections.items():
            merged[name] = {**merged.get(name, {}), **keys}
        callers = [{"name": "ct1", "ae_title": "CT1", "allow": ["echo", "store"]}]
        lines = []
        for name, keys in merged.items():
            lines += [f"[{name}]", *(f"{k} = {toml(v)}" for k, v in keys.items())]
        for table, entries in (("peers", [*callers, *peers]), ("rules", rules)):
            for entry in entries:
                lines += [f"[[{table}]]", *(f"{k} = {toml(v)}" for k, v in entry.items())]
        self.config.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # Life

    def start(self, *verb: str, wait: bool = True) -> Self:
        """``serve`` unless a verb such as ``run receiver`` is given."""
        self._verb = " ".join(verb) or "serve"
        argv = [sys.executable, "-m", "dicomnode", *(verb or ("serve",)), "--config", str(self.config)]
        self._process = Process(argv, self.log, **python_environment(), **self.environment)
        if wait:
            self.wait_ready()
        return self

    def expected(self) -> set[str]:
        """Names of the processes that must be ready."""
        receivers = {f"receiver-{n}" for n in range(1, self.workers + 1)}
        if self._verb == "run receiver":
            return receivers
        names = receivers | {"worker", "courier"}
        # Children look the module up themselves: without it they are restarted for ever.
        return names | {"sidecar"} if find_spec("dicomnode.sidecar") else names

    def wait_ready(self, seconds: float = 60) -> None:
        def ready() -> bool:
            if self._process is not None and not self._process.running:
                raise AssertionError(f"the node ended: {self.tail()}")
            return self.expected() <= set(self.pids())

        self.wait(ready, seconds, "every process is ready")

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM; the exit code. No log line may hold the canary."""
        assert self._process is not None
        if self._db is not None:
            self._db.close()
            self._db = None
        code = self._process.stop(seconds)
        self._process = None
        assert CANARY.casefold() not in self.log.read_text(errors="replace").casefold(), "a patient's name was logged"
        return code

    def bury(self) -> None:
        """The node was killed: forget it, so that it can be started again."""
        assert self._process is not None
        self._process.stop(5)
        self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.popen.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def family(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]

    def pids(self) -> dict[str, int]:
        """Live processes that said that they are ready, by name."""
        try:
            rows = self.rows("SELECT name, pid FROM processes WHERE state = 'ready'")
        except apsw.Error:
            return {}
        return {r["name"]: r["pid"] for r in rows if alive(r["pid"])}

    def kill(self, name: str, seconds: float = 30) -> int:
        """SIGKILL the process of that name, as soon as it lives."""
        pid = self.wait(lambda: self.pids().get(name), seconds, f"{name} runs")
        os.kill(pid, signal.SIGKILL)
        return int(pid)

    # Looking

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """As a query of a peer does, it sees what was acknowledged before it."""
        wait_until_visible(self.data_dir / "journal", self.visible_seconds)
        if not (self.data_dir / "index.sqlite").exists():
            return []
        if self.looks_at_copies:
            return self._rows_of_copy(sql, parameters)
        if self._db is None:
            self._db = apsw.Connection(str(self.data_dir / "index.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
            self._db.set_busy_timeout(10_000)
        return rows_of(self._db, sql, parameters)

    def _rows_of_copy(self, sql: str, parameters: Sequence[Any]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(20):
                for ending in ("", "-wal"):
                    with contextlib.suppress(FileNotFoundError):
                        shutil.copyfile(self.data_dir / f"index.sqlite{ending}", Path(folder) / f"index.sqlite{ending}")
                try:
                    with contextlib.closing(apsw.Connection(str(Path(folder) / "index.sqlite"))) as db:
                        return rows_of(db, sql, parameters)
                except apsw.Error:  # not made yet, or copied while it changed
                    continue
        return []

    def jobs(self, series_uid: str) -> list[dict[str, Any]]:
        return self.rows(
            "SELECT j.* FROM jobs j JOIN series s ON s.id = j.series_id WHERE s.SeriesInstanceUID = ? ORDER BY j.id",
            (series_uid,),
        )

    def deliveries(self, series_uid: str) -> list[dict[str, Any]]:
        return self.rows(
            "SELECT d.*, r.kind, r.SOPInstanceUID, j.revision FROM deliveries d JOIN results r ON r.id = d.result_id"
            " JOIN jobs j ON j.id = d.job_id JOIN series s ON s.id = j.series_id WHERE s.SeriesInstanceUID = ?"
            " ORDER BY d.id",
            (series_uid,),
        )

    def instance(self, uid: str) -> dict[str, Any] | None:
        found = self.rows("SELECT * FROM instances WHERE SOPInstanceUID = ?", (uid,))
        return found[0] if found else None

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = self.rows("SELECT * FROM events ORDER BY id")
        return [e for e in found if kind is None or e["kind"] == kind]

    def stored_part10(self, row: dict[str, Any]) -> bytes:
        return (self.data_dir / "objects" / row["file"]).read_bytes()

    def wait_job(self, series_uid: str, *, state: str = "done", revision: int = 1, seconds: float = 60) -> Any:
        def found() -> Any:
            return [j for j in self.jobs(series_uid) if j["state"] == state and j["revision"] == revision]

        return self.wait(found, seconds, f"revision {revision} of the job is {state}")[0]

    def wait_delivered(self, series_uid: str, count: int = 2, seconds: float = 60) -> list[dict[str, Any]]:
        def done() -> Any:
            rows = self.deliveries(series_uid)
            return rows if len(rows) >= count and all(r["state"] == "stored" for r in rows) else None

        found: list[dict[str, Any]] = self.wait(done, seconds, f"{count} deliveries are stored")
        return found

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        return wait_for(condition, seconds, what, self.tail)

    def tail(self) -> str:
        parts = ["log: " + "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])]
        for table in ("jobs", "deliveries", "associations"):
            try:
                parts.append(f"{table}: {self.rows(f'SELECT * FROM {table} ORDER BY rowid DESC LIMIT 4')}")
            except apsw.Error as error:
                parts.append(f"{table}: {error}")
        return "\n".join(parts)

    def cli(self, *verb: str, code: int = 0) -> str:
        """Run a verb of the command line; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "dicomnode", *verb, "--config", str(self.config)],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **python_environment()},
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr if code else done.stdout


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Series


class Series:
    """A phantom series: ``items`` as they go over the wire, ``datasets`` to write files from."""

    def __init__(self, datasets: Sequence[pydicom.Dataset]) -> None:
        self.datasets = list(datasets)
        self.items = [item_from(ds) for ds in self.datasets]
        self.study_uid = str(self.datasets[0].StudyInstanceUID)
        self.series_uid = str(self.datasets[0].SeriesInstanceUID)

    def write(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{n:05d}.dcm" for n in range(len(self.datasets))]
        for path, ds in zip(paths, self.datasets, strict=True):
            ds.save_as(path, enforce_file_format=True)
        return paths


@cache
def small_phantom(slices: int = SLICES) -> Phantom:
    """Lungs whole within the smallest matrix that the model's contract allows."""
    return thorax(slices=slices, rows=176, columns=176, pixel_spacing=2.0, slice_spacing=320 / slices)


def make_series(
    description: str, *, change: Callable[[pydicom.Dataset, int], None] | None = None, slices: int = SLICES, **tags: Any
) -> Series:
    """New UIDs each time; ``description`` (SeriesDescription) decides which rules match."""
    datasets = []
    tags = {"PatientName": f"{CANARY}^Test", "StudyDescription": "e2e", **tags}
    study, series = str(generate_uid()), str(generate_uid())
    for number, shared in enumerate(
        to_datasets(
            small_phantom(slices),
            study_uid=str(tags.pop("StudyInstanceUID", study)),
            series_uid=series,
            patient_id=generate_uid()[-20:],
            clock=EXAMPLE_TIME,
        )
    ):
        ds = pydicom.Dataset()  # the slices of to_datasets share elements: a change would be everyone's
        for element in shared:
            ds.add_new(element.tag, element.VR, element.value)
        ds.file_meta = shared.file_meta
        ds.SeriesDescription = description
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        if change is not None:
            change(ds, number)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        datasets.append(ds)
    return Series(datasets)


def item_from(ds: pydicom.Dataset) -> Item:
    from io import BytesIO

    from pydicom.filebase import DicomIO
    from pydicom.filewriter import write_dataset

    buffer = DicomIO(BytesIO())
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, ds)
    return Item(CT_IMAGE, str(ds.SOPInstanceUID), EXPLICIT_LITTLE, buffer.parent.getvalue())


# Reading results


def placed_labels(seg: pydicom.Dataset, sources: Sequence[pydicom.Dataset]) -> np.ndarray:
    """The SEG placed on its source slices, in their order: uint8 (slices, rows, columns).

    Frames are placed by Image Position (Patient); the referenced instance must agree.
    """
    by_position = {tuple(round(float(v), 3) for v in s.ImagePositionPatient): i for i, s in enumerate(sources)}
    labels = np.zeros((len(sources), seg.Rows, seg.Columns), np.uint8)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        index = by_position[tuple(round(float(v), 3) for v in position)]
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert reference == sources[index].SOPInstanceUID
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert not labels[index][frame > 0].any(), "segments overlap"
        labels[index][frame > 0] = number
    return labels


def sr_volumes(sr: pydicom.Dataset) -> dict[int, float]:
    """Segment number -> volume in ml, from the measurement groups of TID 1411."""
    found: dict[int, float] = {}

    def walk(item: pydicom.Dataset) -> None:
        content = item.get("ContentSequence", [])
        segments = [
            c.ReferencedSOPSequence[0].ReferencedSegmentNumber
            for c in content
            if c.ValueType == "IMAGE" and "ReferencedSegmentNumber" in c.ReferencedSOPSequence[0]
        ]
        for child in content:
            if child.ValueType == "NUM" and segments:
                value = child.MeasuredValueSequence[0]
                if value.MeasurementUnitsCodeSequence[0].CodeValue == "ml":
                    found[int(np.ravel(segments[0])[0])] = float(value.NumericValue)
            walk(child)

    walk(sr)
    return found
