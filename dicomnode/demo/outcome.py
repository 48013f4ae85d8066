"""Builds the demo's report from the node's rows and the objects that the PACS holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from PIL import Image

from dicomnode.demo.check import Check, Comparison, check_phantom, check_validity, compare_tilt
from dicomnode.demo.inputs import Inputs, SentSeries
from dicomnode.demo.montage import save_png
from dicomnode.demo.montages import draw_phantom, draw_series
from dicomnode.demo.objects import Number, read_numbers
from dicomnode.demo.workspace import Workspace
from dicomnode.errors import NodeError
from dicomnode.index.database import Row

RADIOGRAPHS = "cxr-quality"
ANSWERED = ("done", "refused", "superseded", "skipped", "not-run")


@dataclass(slots=True)
class Findings:
    """What the demo concludes; ``jobs`` are JSON-ready rows for :mod:`dicomnode.demo.report`."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    montages: list[Path] = field(default_factory=list)
    unmatched: list[dict[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.checks)


def conclude(
    inputs: Inputs, failed: Sequence[str], jobs: Sequence[Row], objects: Mapping[str, bytes], space: Workspace
) -> Findings:
    """Judge everything. ``failed``: why images were not stored; ``objects``: what the PACS has by UID."""
    out = Findings()
    out.checks.append(_counted("images stored at the node", len(inputs.files) - len(failed), len(inputs.files)))
    if failed:
        out.checks[-1] = Check(out.checks[-1].what, f"{out.checks[-1].found}: {failed[0]}", "all of them", False)
    series = {s.series_uid: s for s in inputs.series}
    files = save_objects(objects, space.results)
    _check_whole(inputs, jobs, objects, out)
    for job in jobs:
        out.jobs.append(_job(job, series.get(job["SeriesInstanceUID"]), inputs, files, space, out))
    matched = {job["SeriesInstanceUID"] for job in jobs}
    out.unmatched = [
        {"series": s.name, "why": f"the rules are for CT, CR and DX; this is {s.modality or 'without a modality'}"}
        for s in inputs.series
        if s.series_uid not in matched
    ]
    validity = check_validity(list(files.values()))
    if validity:
        out.checks.append(validity)
    return out


def save_objects(objects: Mapping[str, bytes], folder: Path) -> dict[str, Path]:
    """Write what came back as ``SEG-….dcm`` and ``SR-….dcm``; returns the path by UID."""
    paths = {}
    for uid, part10 in objects.items():
        modality = str(pydicom.dcmread(BytesIO(part10), specific_tags=["Modality"]).get("Modality", "")) or "OT"
        path = folder / f"{modality if modality.isalnum() else 'OT'}-{uid[-12:].replace('.', '')}.dcm"
        path.write_bytes(part10)
        paths[uid] = path
    return paths


def _counted(what: str, found: int, wanted: int) -> Check:
    return Check(what, str(found), str(wanted), found == wanted)


def _check_whole(inputs: Inputs, jobs: Sequence[Row], objects: Mapping[str, bytes], out: Findings) -> None:
    states = Counter(str(job["state"]) for job in jobs)
    text = ", ".join(f"{count} {state}" for state, count in states.items()) or "no job"
    if inputs.phantom is not None:
        out.checks.append(Check("jobs", text, "1 done", states == {"done": 1}))
    else:
        out.checks.append(Check("jobs", text, "all done or refused", all(state in ANSWERED for state in states)))
    wanted = [str(r["SOPInstanceUID"]) for job in jobs for r in job["results"]]
    found = sum(uid in objects for uid in wanted)
    out.checks.append(_counted("results at the PACS", found, len(wanted)))
    out.checks.append(_counted("other objects at the PACS", len(set(objects) - set(wanted)), 0))
    for job in jobs:
        if job["state"] != "done":
            continue
        kinds = Counter(str(r["kind"]) for r in job["results"])
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        exact = kinds == {"SEG": 1, "SR": 1}
        empty = inputs.phantom is None and kinds == {"SR": 1}  # the model found nothing: there is no SEG
        if str(job["model"]).startswith(RADIOGRAPHS):
            right = kinds["SR"] == 1 and kinds["SC"] <= kinds["SEG"] + 1
            right = right and (inputs.leaning is None or kinds == {"SEG": 1, "SR": 1, "SC": 1})
            out.checks.append(Check(f"objects of job {job['id']}", text, "1 SR, for each image a SEG", right))
            continue
        out.checks.append(Check(f"objects of job {job['id']}", text, "1 SEG, 1 SR", exact or empty))


def _job(
    job: Row,
    series: SentSeries | None,
    inputs: Inputs,
    files: Mapping[str, Path],
    space: Workspace,
    out: Findings,
) -> dict[str, Any]:
    """One row of the report; draws the montage and adds its checks to ``out``."""
    summary = job["summary"] or {}
    paths = {str(r["kind"]): files.get(str(r["SOPInstanceUID"])) for r in job["results"]}
    row: dict[str, Any] = {
        "id": job["id"],
        "state": str(job["state"]),
        "series": series.name if series else "a series that the demo did not send",
        "model": f"{job['model']} {job['model_version'] or ''}".strip(),
        "engine": summary.get("engine", ""),
        "reason": job["reason"],
        "error": job["last_error"],
        "notes": job["notes"] or [],
        "seconds": _seconds(job),
        "results": [_result(r, files) for r in job["results"]],
        "measurements": [],
        "compared": False,
        "montage": None,
    }
    seg, sr = (pydicom.dcmread(p) if p else None for p in (paths.get("SEG"), paths.get("SR")))
    try:
        if sr is not None:
            names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in seg.SegmentSequence} if seg is not None else {}
            row["measurements"] = [_measurement(n, names) for n in read_numbers(sr)]
        if str(job["model"]).startswith(RADIOGRAPHS):
            _judge_radiograph(job, sr, paths.get("SC"), inputs, row, space, out)
        elif seg is not None and sr is not None and series is not None:
            row["montage"] = str(_judge(job, series, seg, sr, inputs, row, space, out))
    except (NodeError, AttributeError, KeyError, ValueError) as error:
        cause = str(error) if isinstance(error, NodeError) else f"it cannot be read ({type(error).__name__}: {error})"
        out.checks.append(Check(f"content of job {job['id']}", cause, "readable, in its place", False))
    return row


def _judge(
    job: Row,
    series: SentSeries,
    seg: Any,
    sr: Any,
    inputs: Inputs,
    row: dict[str, Any],
    space: Workspace,
    out: Findings,
) -> Path:
    numbers = read_numbers(sr)
    subtitle = f"{series.name}   {row['model']}   {row['engine']}"
    path = space.root / ("montage.png" if inputs.phantom is not None else f"montage-{job['id']}.png")
    if inputs.phantom is not None:
        placed, comparisons, checks = check_phantom(seg, sr, inputs.phantom)
        row["compared"] = bool(comparisons)
        out.comparisons += comparisons
        out.checks += checks
        draw_phantom(inputs.phantom, placed, numbers, subtitle, path)
    else:
        used = {
            str(r.ReferencedSOPInstanceUID) for s in seg.ReferencedSeriesSequence for r in s.ReferencedInstanceSequence
        }
        sources = [f.path for f in inputs.files if inputs.uid_of.get(f.key) in used]
        draw_series(sources, seg, numbers, (f"Job {job['id']}", subtitle), path)
        out.checks.append(Check(f"SEG of job {job['id']}", "lies on the images", "lies on the images", True))
    out.montages.append(path)
    return path


def _judge_radiograph(
    job: Row, sr: Any, picture: Path | None, inputs: Inputs, row: dict[str, Any], space: Workspace, out: Findings
) -> None:
    """The tilt against the phantom's; the node's own key image is the picture."""
    if inputs.leaning is not None and sr is not None:
        found = compare_tilt(read_numbers(sr), inputs.leaning)
        out.comparisons += found
        out.checks.append(Check(f"tilt of job {job['id']}", f"{len(found)} right", "1 right", all(c.ok for c in found)))
    if picture is not None:
        path = space.root / f"radiograph-{job['id']}.png"
        save_png(Image.fromarray(pydicom.dcmread(picture).pixel_array), path)
        row["montage"] = str(path)
        out.montages.append(path)


def _seconds(job: Row) -> dict[str, float]:
    """Stages of the worker, what its commit took, the delivery, and all from the last image on."""
    stages: dict[str, float] = dict(job["seconds"] or {})
    if not stages:
        return {}
    stages.pop("total", None)
    stored = [float(d["finished_at"]) for d in job["deliveries"] if d["finished_at"]]
    worked = sum(v for k, v in stages.items() if k not in ("wait", "commit"))
    stages["commit"] = max(0.0, float(job["finished_at"]) - float(job["started_at"]) - worked)
    if stored:
        stages["deliver"] = max(0.0, max(stored) - float(job["finished_at"]))
        stages["end to end"] = max(stored) - float(job["last_received_at"])
    return stages


def _result(result: Row, files: Mapping[str, Path]) -> dict[str, Any]:
    path = files.get(str(result["SOPInstanceUID"]))
    return {
        "kind": str(result["kind"]),
        "sop_instance_uid": str(result["SOPInstanceUID"]),
        "at_pacs": path is not None,
        "bytes": path.stat().st_size if path else 0,
        "file": str(path) if path else None,
    }


def _measurement(number: Number, names: Mapping[int, str]) -> dict[str, Any]:
    structure = names.get(number.segment or 0, "series" if number.segment is None else f"segment {number.segment}")
    unit = {"[hnsf'U]": "HU"}.get(number.unit, number.unit)
    return {"structure": structure, "quantity": number.meaning, "value": number.value, "unit": unit}
