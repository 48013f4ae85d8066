"""An index of 1,000,000 instances: intake beside an empty one, and queries over the wire."""

from __future__ import annotations

import random
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from benchmarks import clients, data
from benchmarks.node import AE_TITLE, Node
from benchmarks.peers import Acceptor, dicomnode
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import Bench, Samples, Skipped, percentile, remove, say
from benchmarks.upper_layer import STUDY_ROOT_FIND, Association, encoded

SLOWER = 1.10
FIND_MS = 20.0
EMPTY, FULL = "empty index", "full index"
WORKLIST = "studies of a week, with counts and modalities"
QUERIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "one study by StudyInstanceUID": ("STUDY", ("StudyInstanceUID",)),
    "studies by PatientID": ("STUDY", ("PatientID",)),
    "studies by AccessionNumber": ("STUDY", ("AccessionNumber",)),
    "studies by PatientName": ("STUDY", ("PatientName",)),
    "series of a study": ("SERIES", ("StudyInstanceUID",)),
    "one instance": ("IMAGE", ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")),
    "instances of a series": ("IMAGE", ("StudyInstanceUID", "SeriesInstanceUID")),
    "studies of a week": ("STUDY", ("StudyDate",)),
    WORKLIST: ("STUDY", ("StudyDate",)),
}
"""Level and the keys that are given; the rest of what a viewer asks for is left empty."""

ASKED = {
    "STUDY": ("StudyInstanceUID", "PatientID", "PatientName", "StudyDate", "StudyTime", "AccessionNumber"),
    "SERIES": ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription"),
    "IMAGE": ("SOPInstanceUID", "InstanceNumber", "SOPClassUID"),
}
ASKED_BY_LISTS = (
    "StudyDescription",
    "PatientBirthDate",
    "PatientSex",
    "ReferringPhysicianName",
    "ModalitiesInStudy",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)


def run(bench: Bench) -> Section:
    try:
        from fill_index import fill_index  # beside bench.py
    except ImportError:
        raise Skipped("scripts/fill_index.py is not here") from None
    count = bench.amount(1_000_000, 20_000)
    full = bench.folder("full-index")
    say.print(f"scale: filling an index with {count} instances …")
    begin = time.perf_counter()
    fill_index(full, count)
    filled = time.perf_counter() - begin
    sets = (data.ct(bench), data.small(bench))
    idle = {s.name: clients.start_up(clients.dcmsend(s, AE_TITLE)) for s in sets}
    found: dict[tuple[str, str], Samples] = {}
    for turn in range(bench.repeat):
        for name in (EMPTY, FULL):
            say.print(f"scale {turn + 1}/{bench.repeat}: intake into the {name} …")
            folder = bench.folder("scale")
            with dicomnode(folder, data_dir=full if name == FULL else None) as acceptor:
                for objects in sets:
                    seconds = _intake(objects, acceptor)
                    found.setdefault((name, objects.name), Samples()).add(seconds)
            remove(folder)
    section = Section()
    rows: list[Row] = []
    for objects in sets:
        empty, loaded = (found[name, objects.name].less(idle[objects.name]) for name in (EMPTY, FULL))
        text = f"{loaded / empty:.2f}x"
        rows.append({"set": objects.name, f"{EMPTY}, s": f"{empty:.2f}", f"{FULL}, s": f"{loaded:.2f}", "ratio": text})
        what = f"intake of {objects.name} into {count:,} instances"
        section.goals.append(Goal(what, f"within {SLOWER:.1f}x of an empty index", text, loaded <= SLOWER * empty))
        remove(objects.folder)
    note = f"dcmsend, TCP_NODELAY, start taken off; best of {bench.repeat}. Filled in {filled:.0f} s."
    section.tables.append(Figures(f"Intake into an index of {count:,} instances", rows, note))
    section.samples["intake"] = {f"{name}, {s}": v.as_json() for (name, s), v in found.items()}
    _find(bench, section, full, count)
    remove(full)
    return section


def _intake(objects: data.ObjectSet, acceptor: Acceptor) -> float:
    argv = clients.dcmsend(objects, acceptor.called)
    return clients.send(objects, acceptor, argv, no_delay=True, what="intake for scale")


def _find(bench: Bench, section: Section, full: Path, count: int) -> None:
    times: dict[str, list[float]] = {}
    answers: dict[str, list[int]] = {}
    node = Node(bench.folder("asked"), data_dir=full)
    say.print("scale: queries …")
    with node.serving():
        keys = _some_keys(node, bench.amount(200, 20))
        with Association(node.port, AE_TITLE, STUDY_ROOT_FIND) as association:
            association.find(
                encoded(_identifier("one study by StudyInstanceUID", keys[0]))
            )  # opens what is opened once
            for row in keys:
                for query in QUERIES:
                    identifier = encoded(_identifier(query, row))
                    begin = time.perf_counter()
                    number = association.find(identifier)
                    times.setdefault(query, []).append(1000 * (time.perf_counter() - begin))
                    answers.setdefault(query, []).append(number)
    remove(node.folder)
    if any(0 in numbers for numbers in answers.values()):
        raise Skipped("a query for what the index holds found nothing")
    rows: list[Row] = [
        {
            "query": query,
            "times": len(values),
            "answers each": f"{sum(answers[query]) / len(values):.1f}",
            "p50 ms": f"{percentile(values, 0.5):.1f}",
            "p95 ms": f"{percentile(values, 0.95):.1f}",
            "most ms": f"{max(values):.1f}",
        }
        for query, values in times.items()
    ]
    note = "Random keys that exist, one persistent association; from request to final response."
    section.tables.append(Figures(f"C-FIND in {count:,} instances", rows, note))
    worst = max(percentile(values, 0.95) for values in times.values())
    text = f"{worst:.1f} ms for the slowest kind"
    section.goals.append(Goal("C-FIND by indexed keys, p95", f"< {FIND_MS:.0f} ms", text, worst < FIND_MS))
    section.samples["find_ms"] = times


def _some_keys(node: Node, number: int) -> list[dict[str, Any]]:
    """Keys of random instances."""
    highest = int(node.value("SELECT max(id) FROM instances"))
    chooser = random.Random(1)
    sql = (
        "SELECT i.SOPInstanceUID, s.SeriesInstanceUID, t.StudyInstanceUID, t.AccessionNumber, t.StudyDate, p.PatientID,"
        " p.PatientName FROM instances i JOIN series s ON s.id = i.series_id JOIN studies t ON t.id = s.study_id"
        " JOIN patients p ON p.id = t.patient_id WHERE i.id >= ? AND t.AccessionNumber <> '' AND t.StudyDate <> ''"
        " AND p.PatientID <> '' AND p.PatientName NOT LIKE 'Bench%' ORDER BY i.id LIMIT 1"
    )
    found = [row for _ in range(number) for row in node.rows(sql, (chooser.randint(1, highest),))]
    if not found:
        raise Skipped("the filled index has no accession numbers")
    return found


def _identifier(query: str, row: dict[str, Any]) -> Dataset:
    level, keys = QUERIES[query]
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.QueryRetrieveLevel = level
    for keyword in (*ASKED[level], *(ASKED_BY_LISTS if query == WORKLIST else ())):
        setattr(ds, keyword, "")
    for keyword in keys:
        setattr(ds, keyword, _week(row[keyword]) if keyword == "StudyDate" else row[keyword])
    return ds


def _week(first: str) -> str:
    return f"{first}-{date.fromisoformat(first) + timedelta(days=6):%Y%m%d}"
