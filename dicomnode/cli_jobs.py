"""What ``dicomnode jobs show`` says, in lines for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dicomnode.infer.placement import told


def job_lines(data: dict[str, Any]) -> Iterator[str]:
    """``data`` as :meth:`dicomnode.index.jobs.Jobs.show` gives it."""
    yield f"job {data['id']}: {data['state']}, {data['model']} {data['model_version'] or ''}"
    yield f"  complete because: {data['reason']}"
    yield f"  study {data['StudyInstanceUID']}"
    yield f"  series {data['SeriesInstanceUID']}"
    yield f"  {data['instances']} images, revision {data['revision']}, rules {', '.join(data['rules'])}"
    yield from _around(data)
    if data["last_error"]:
        yield f"  {'why' if data['state'] in ('skipped', 'not-run') else 'error'}: {data['last_error']}"
    if data["critical"]:
        yield f"  CRITICAL: {', '.join(data['critical'])}"
    if data["placement"]:
        yield f"  placed: {data['placement']['chosen'] or 'nowhere'}"
        yield from (f"    {line}" for line in told(data["placement"]))
    if data["batch_studies"]:
        yield f"  its network shared batches with {data['batch_studies'] - 1} other series"
    yield from _found(data)
    if data["seconds"]:
        yield "  seconds: " + ", ".join(f"{k} {v:.3f}" for k, v in data["seconds"].items())
    for result in data["results"]:
        yield f"  {result['kind']} {result['SOPInstanceUID']}"
    for d in data["deliveries"]:
        yield f"  delivery {d['id']} to {d['destination']}: {d['state']} {d['last_error'] or ''}"


def _around(data: dict[str, Any]) -> Iterator[str]:
    """The step that it is, those before and behind it, and the earlier study."""
    if data["step"]:
        yield f"  step {data['step']}"
    for step in data["steps"]:
        how = "follows" if step["follows"] else "followed by"
        yield f"  {how} {step['name']}: job {step['id']}, {step['model']}, {step['state']}"
    if data["prior"]:
        found = data["prior"]
        how = f"{found['days']} days before, from {found['source']}" if found["source"] else found["last_error"]
        yield f"  earlier study: {found['state']}, {how or 'not yet'}"


def _found(data: dict[str, Any]) -> Iterator[str]:
    summary = data["summary"] or {}
    for note in data["notes"] or []:
        yield f"  note: {note}"
    for m in summary.get("measurements", []):
        yield f"  {m['segment'] or 'series'}: {m['key']} = {m['value']:.4g} {m['unit']}"
    for c in summary.get("changes", []):
        yield f"  {c['segment'] or 'series'}: {c['key']} {c['change']:+.4g} {c['unit']} since the earlier study"
    for f in summary.get("findings", []):
        sure = "" if f["probability"] is None else f", probability {f['probability']:.3f}"
        yield f"  {f['key']}: {f['answer'] or '-'}{sure}"
