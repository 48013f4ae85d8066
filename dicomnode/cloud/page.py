"""What arrived, as pages without scripts: for people who try a node against this endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dicomnode.cloud import content
from dicomnode.cloud.repository_page import offered
from dicomnode.cloud.storage import Storage

SHOWN = 50
STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #4b5a69; --page: #fff; --even: #f2f5f8; --line: #c9d3dc;
--good: #14713d; --bad: #a5182c; --warn: #7a4b00; --link: #0b6e6e }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: var(--ink);
background: var(--page) }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } a { color: var(--link) }
.wide { overflow-x: auto } .wide:focus-visible, a:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; vertical-align: top; font-size: .9rem }
th { border-bottom: 2px solid var(--soft); white-space: nowrap } tr:nth-child(even) td { background: var(--even) }
td.short { white-space: nowrap } td.long { overflow-wrap: anywhere; min-width: 14rem }
code, pre { font: .85em ui-monospace, "DejaVu Sans Mono", monospace } pre { white-space: pre-wrap; margin: .3rem 0 }
dl { display: flex; gap: 1rem 2rem; flex-wrap: wrap } dt { color: var(--soft) } dd { margin: 0; font-size: 1.3rem }
.empty, small { color: var(--soft) }
.good { color: var(--good) } .bad { color: var(--bad) } .warn { color: var(--warn) }
img { max-width: 100%; image-rendering: pixelated; background: #000; min-width: 16rem }
ul.report, ul.report ul { list-style: none; padding-left: 1.1rem; border-left: 1px solid var(--line) }
summary { cursor: pointer }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe7ee; --soft: #a3b1be; --page: #12181e; --even: #1b242d;
--line: #33404c; --good: #7fdca2; --bad: #ff9aa5; --warn: #f5cd7c; --link: #4cc3bd } }
"""

Cell = tuple[str, str]
"""HTML, and the class of its cell."""


def render(storage: Storage, models: Path | None = None) -> str:
    """The page of all that arrived; every value is escaped. ``models``: folder of the repository that is served."""
    objects = storage.rows("SELECT * FROM objects ORDER BY received_time DESC LIMIT ?", (SHOWN,))
    records = storage.rows("SELECT * FROM records ORDER BY seq DESC LIMIT ?", (SHOWN,))
    conflicts = storage.conflicts(None, SHOWN)
    body = [
        "<h1>What arrived</h1>",
        _counts(storage.counts()),
        _section("Nodes: heartbeats and desired states", _nodes(storage.nodes())),
        _section("Results, newest first", _objects(objects)),
        _section("Records, newest first", _records(records)),
        _section("Conflicts, newest first", _conflicts(conflicts)),
        _section("Metrics (remote-write), newest values", _series(storage.series_nodes(), storage)),
        _section("Models that are offered", _models(models)),
        '<p><small>All times are UTC. An endpoint for trying and testing: <a href="/health">health</a>.</small></p>',
    ]
    return _document("dicomnode cloud", "".join(body), refresh=True)


def object_page(uid: str, site: str, data: bytes) -> str:
    """One object: its header in short, its report as text, its segments, its picture."""
    found = content.describe(data)
    query = f"?site={escape(site, quote=True)}" if site else ""
    parts = [f'<p><a href="/">What arrived</a></p><h1>{escape(found.head.get("Series Description", "Object"))}</h1>']
    if found.fault:
        parts.append(f'<p class="bad">{escape(found.fault)}</p>')
    parts.append(_table(("attribute", "value"), ([_short(k), _long(v)] for k, v in found.head.items())))
    if found.segments:
        heads = ("number", "label", "what", "algorithm")
        parts.append(_section("Segments", _table(heads, (list(map(_short, row)) for row in found.segments))))
    if found.picture:
        text = "Picture of the object; of a segmentation, seen through all its frames"
        parts.append(_section("Picture", f'<img src="/objects/{escape(uid)}/picture{query}" alt="{text}">'))
    if found.lines:
        parts.append(_section("Report", _report(found.lines)))
    parts.append(f'<p><a href="/v1/objects/{escape(uid)}{query}" download>The DICOM file</a></p>')
    return _document(f"object {uid}", "".join(parts), refresh=False)


def _document(title: str, body: str, *, refresh: bool) -> str:
    again = '<meta http-equiv="refresh" content="10">' if refresh else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f'<link rel="stylesheet" href="/style.css"></head><body><main>{body}</main></body></html>'
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _counts(counts: Mapping[str, int]) -> str:
    shown = {k: size(n) if k == "bytes" else f"{n:,}" for k, n in counts.items()}
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(n)}</dd></div>" for k, n in shown.items()) + "</dl>"


def _nodes(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("site", "node", "last heartbeat", "version", "models", "waits", "disk free", "clock", "desired", "answer")
    return _table(heads, map(_node, rows))


def _node(row: Mapping[str, Any]) -> list[Cell]:
    beat = row["heartbeat"] or {}
    models = ", ".join(f"{m.get('name')} {m.get('version')}" for m in _list(beat.get("models")))
    queues = _object(beat.get("queues"))
    waits = [(name, sum(_whole(_object(q).get(s)) for s in ("pending", "sending"))) for name, q in queues.items()]
    skew, free = beat.get("clock_skew_seconds"), _object(beat.get("disk")).get("free_mb")
    dead = [name for name, alive in _object(beat.get("processes")).items() if not alive]
    answer = '<span class="empty">nothing is desired</span>'
    if row["generation"]:
        answer = '<span class="warn">no answer yet</span>'
    if report := row["report"]:
        tone, word = ("good", "applied") if report["applied"] else ("bad", "refused")
        late = (
            "" if report["generation"] == row["generation"] else " <span class=warn>the newest is not answered</span>"
        )
        text = f"generation {int(report['generation'])} {word} {moment(row['report_time'])}"
        answer = f'<span class="{tone}">{escape(text)}</span> {escape(str(report.get("reason") or ""))}{late}'
    desired = f"{int(row['generation'])} {_details(row['desired'])}" if row["generation"] else ""
    down = f' <span class="bad">down: {escape(", ".join(dead))}</span>' if dead else ""
    return [
        _short(row["site"]),
        _short(row["name"]),
        _short(moment(row["heartbeat_time"]) or "never"),
        (f"{escape(str(beat.get('version', '')))}{down}", ""),
        _plain(models),
        _plain(", ".join(f"{name} {n}" for name, n in waits if n) or "nothing"),
        _short(f"{free / 1024:.1f} GiB" if isinstance(free, int | float) else ""),
        _short(f"{skew:+.1f} s" if isinstance(skew, int | float) else ""),
        (desired, ""),
        (answer, "long"),
    ]


def _objects(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("time", "site", "modality", "patient", "identity", "study", "object", "size", "sent")
    return _table(heads, map(_object_row, rows))


def _object_row(row: Mapping[str, Any]) -> list[Cell]:
    removed = row["PatientIdentityRemoved"] == "YES"
    identity = '<span class="good">removed</span>' if removed else '<span class="warn">kept</span>'
    uid, query = str(row["SOPInstanceUID"]), f"?site={escape(row['site'], quote=True)}" if row["site"] else ""
    differing = f" ({int(row['differing'])} with other bytes)" if row["differing"] else ""
    return [
        _short(moment(row["received_time"])),
        _short(row["site"]),
        _short(row["Modality"]),
        _short(row["PatientID"]),
        (identity, "short"),
        (f"<code>{escape(ending(row['StudyInstanceUID']))}</code>", "short"),
        (f'<a href="/objects/{escape(uid)}{query}"><code>{escape(ending(uid))}</code></a>', "short"),
        _short(size(int(row["size"]))),
        _short(f"{row['puts']} x{differing}"),
    ]


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("time", "site", "written by", "type", "id", "version", "data")
    return _table(
        heads,
        (
            [
                _short(moment(r["received_time"])),
                _short(r["site"]),
                _short(r["node"] or "the cloud"),
                _short(r["type"]),
                (f"<code>{escape(ending(r['id'], 32))}</code>", "short"),
                _short(r["version"]),
                (_details(json.loads(r["data"])), "long"),
            ]
            for r in rows
        ),
    )


def _conflicts(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("no.", "time", "site", "type", "record", "state", "at the cloud", "at the node")
    tones = {"open": "warn"}
    return _table(
        heads,
        (
            [
                _short(r["id"]),
                _short(moment(r["time"])),
                _short(r["site"]),
                _short(r["type"]),
                (f"<code>{escape(ending(r['record_id'], 32))}</code>", "short"),
                (f'<span class="{tones.get(r["state"], "good")}">{escape(r["state"])}</span>', "short"),
                (_details(r["cloud_data"]), "long"),
                (_details(r["edge_data"]), "long"),
            ]
            for r in rows
        ),
    )


def _series(nodes: Sequence[Mapping[str, Any]], storage: Storage) -> str:
    parts = []
    for node in nodes:
        name = f"{node['site']}/{node['node']}" if node["site"] else str(node["node"])
        told = f"{int(node['series']):,} series, {int(node['samples']):,} samples, last {moment(node['received_time'])}"
        rows = storage.series(node["site"], node["node"])
        table = _table(("series", "value"), ([_long(r["labels"]), _short(f"{r['value']:g}")] for r in rows))
        parts.append(f"<details><summary>{escape(name)}: {escape(told)}</summary>{table}</details>")
    return "".join(parts) or _nothing("metrics.remote_write_url of a node ends in /api/v1/write here")


def _models(folder: Path | None) -> str:
    if folder is None:
        return _nothing("start with --models DIR, a repository made by 'dicomnode models publish'")
    rows, ends = offered(folder)
    table = _table(
        ("model", "version", "size", "SHA-256"),
        ([_short(m), _short(v), _short(size(n)), _short(digest[:16] + "…")] for m, v, n, digest in rows),
    )
    return f"<p>Valid until {escape(moment(ends) or 'unknown')}.</p>{table}"


def _report(lines: Iterable[tuple[int, str, str]]) -> str:
    """Nested lists, one level for each content item that contains others."""
    out, depth = ['<ul class="report">'], 0
    for level, name, value in lines:
        while depth < level:
            out.append("<ul>")
            depth += 1
        while depth > level:
            out.append("</ul>")
            depth -= 1
        out.append(f"<li>{escape(name)}{f': <b>{escape(value)}</b>' if value else ''}</li>")
    return "".join([*out, "</ul>" * (depth + 1)])


def _details(value: Any) -> str:
    """One line, and the whole when it is opened."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= 90:
        return f"<code>{escape(text)}</code>"
    whole = json.dumps(value, ensure_ascii=False, indent=1)
    return f"<details><summary><code>{escape(text[:80])}…</code></summary><pre>{escape(whole)}</pre></details>"


def _short(value: Any) -> Cell:
    return escape(str(value)), "short"


def _plain(value: Any) -> Cell:
    return escape(str(value)), ""


def _long(value: Any) -> Cell:
    return escape(str(value)), "long"


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def moment(text: str | None) -> str:
    return str(text or "")[:19].replace("T", " ").rstrip("Z")


def size(number: int) -> str:
    for unit, divisor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= divisor:
            return f"{number / divisor:.1f} {unit}"
    return f"{number} B"


def ending(uid: str, most: int = 20) -> str:
    """The part of a UID that tells it from others."""
    return uid if len(uid) <= most else f"…{uid[-most:]}"


def _nothing(hint: str = "") -> str:
    return f'<p class="empty">nothing yet{escape(f" ({hint})") if hint else ""}</p>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A column whose cells are all empty is left out: one site, for example."""
    kept = [list(row) for row in rows]
    if not kept:
        return _nothing()
    columns = [n for n in range(len(heads)) if any(row[n][0] for row in kept)]
    head = "".join(f"<th scope=col>{escape(heads[n])}</th>" for n in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{row[n][1]}">{row[n][0]}</td>' for n in columns) + "</tr>" for row in kept
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
