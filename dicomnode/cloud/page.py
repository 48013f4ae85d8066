"""What arrived, as one page without scripts: for people who try a node against this endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dicomnode.cloud.storage import Storage

SHOWN = 50
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b2733 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .25rem .6rem }
th { border-bottom: 2px solid #5b6b7b } tr:nth-child(even) td { background: #f2f5f8 }
code { font-size: .85em; word-break: break-all } dl { display: flex; gap: 2rem; flex-wrap: wrap }
dt { color: #4b5a69 } dd { margin: 0; font-size: 1.3rem } .empty { color: #4b5a69 }
@media (prefers-color-scheme: dark) { body { background: #12181e; color: #dfe7ee }
tr:nth-child(even) td { background: #1b242d } dt, .empty { color: #a3b1be } }
"""


def render(storage: Storage) -> str:
    """The page as HTML; every value is escaped."""
    counts = storage.counts()
    objects = storage.rows(
        "SELECT o.*, a.seq FROM objects o JOIN arrivals a ON a.kind = 'object' AND a.name = o.SOPInstanceUID"
        " ORDER BY a.seq DESC LIMIT ?",
        (SHOWN,),
    )
    records = storage.rows("SELECT * FROM records ORDER BY seq DESC LIMIT ?", (SHOWN,))
    body = [
        "<h1>What arrived</h1>",
        "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{n:,}</dd></div>" for k, n in counts.items()) + "</dl>",
        _section("Nodes", _nodes(storage.nodes())),
        _section("Objects, newest first", _objects(objects)),
        _section("Records, newest first", _records(records)),
        _section("Open conflicts", _conflicts(storage.conflicts("open", SHOWN))),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dicomnode cloud</title>'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="refresh" content="10">'
        f'<link rel="stylesheet" href="/style.css"></head><body>{"".join(body)}</body></html>'
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _nodes(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["node", "last heartbeat", "version", "desired generation", "report"],
        [
            [
                r["name"],
                r["heartbeat_time"] or "never",
                (r["heartbeat"] or {}).get("version", ""),
                r["generation"],
                _short(r["report"]) if r["report"] else "",
            ]
            for r in rows
        ],
    )


def _objects(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["time", "modality", "patient", "identity removed", "study", "instance", "bytes", "sent"],
        [
            [r["received_time"], r["Modality"], r["PatientID"], r["PatientIdentityRemoved"] or "NO",
             r["StudyInstanceUID"], r["SOPInstanceUID"], r["size"], r["puts"]]
            for r in rows
        ],
    )  # fmt: skip


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["time", "node", "type", "id", "version", "data"],
        [
            [r["received_time"], r["node"] or "cloud", r["type"], r["id"], r["version"], _short(json.loads(r["data"]))]
            for r in rows
        ],
    )


def _conflicts(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["id", "type", "record", "node", "cloud", "edge"],
        [
            [r["id"], r["type"], r["record_id"], r["node"], _short(r["cloud_data"]), _short(r["edge_data"])]
            for r in rows
        ],
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:160] + " ..."


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<td><code>{escape(str(v))}</code></td>" for v in row) + "</tr>" for row in rows]
    if not lines:
        return '<p class="empty">nothing yet</p>'
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
