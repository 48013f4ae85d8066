"""The dashboard: one server-rendered page from one value; pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicomnode.admin.conflicts_page import conflicts_table
from dicomnode.admin.fleet_page import fleet_lines
from dicomnode.admin.markup import Child, Markup, document, element, join
from dicomnode.admin.model_figures import VersionFigures
from dicomnode.admin.models_page import comparisons_table, history_table, versions_table
from dicomnode.admin.phrases import phrase
from dicomnode.admin.placement_cell import placement_cell
from dicomnode.admin.ready import Check
from dicomnode.admin.refused_page import refused_table
from dicomnode.admin.tones import tone_of
from dicomnode.admin.words import Language, word
from dicomnode.conflicts import KIND_OF
from dicomnode.index.jobs import PRIORITIES
from dicomnode.logs import uid_hash
from dicomnode.settings import Settings

REFRESH_SECONDS = 10
_TAGS: Mapping[str, str] = {"en": "en", "zh": "zh-CN"}
_RECORD_ITEMS = frozenset(KIND_OF)
_OF_NOBODY = frozenset({"settings", "preferences", "limits"})


@dataclass(frozen=True, slots=True)
class View:
    """All that the page shows. ``report`` is :func:`dicomnode.admin.status.status_report`."""

    settings: Settings
    report: Mapping[str, Any]
    checks: Mapping[str, Check]
    jobs: Sequence[Mapping[str, Any]]
    deliveries: Sequence[Mapping[str, Any]]
    sync: Sequence[Mapping[str, Any]]
    language: Language
    changes_allowed: bool
    notifications: Sequence[Mapping[str, Any]] = ()
    commitments: Sequence[Mapping[str, Any]] = ()
    model_versions: Sequence[Mapping[str, Any]] = ()
    model_figures: Sequence[VersionFigures] = ()
    model_history: Sequence[Mapping[str, Any]] = ()
    model_comparisons: Sequence[Mapping[str, Any]] = ()
    conflicts: Sequence[Mapping[str, Any]] = ()
    refused: Sequence[Mapping[str, Any]] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    refresh_seconds: int = REFRESH_SECONDS


def render(view: View) -> str:
    """The page as HTML. Patient data is not in the view; UIDs are shown as short hashes."""

    def w(key: str) -> str:
        return word(key, view.language)

    ready = all(check.ok for check in view.checks.values())
    other = "en" if view.language == "zh" else "zh"
    again = element("meta", http_equiv="refresh", content=str(view.refresh_seconds))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("noscript", again) if view.changes_allowed else again,
        element("title", f"{view.settings.node.ae_title} · {w('title')}"),
        element("link", rel="stylesheet", href="/static/style.css"),
        element("link", rel="icon", href="/static/icon.svg", type="image/svg+xml"),
        element("script", src="/static/app.js", defer=True) if view.changes_allowed else None,
    )
    header = element(
        "header",
        element("h1", view.settings.node.ae_title, element("small", w("title"))),
        element("span", w("ready" if ready else "not_ready"), class_=f"pill {'good' if ready else 'bad'} large"),
        element("nav", element("a", w("language"), href=f"/?lang={other}", hreflang=other, lang=_TAGS[other])),
    )
    sections = {
        "checks": _checks(view, w),
        "jobs": _jobs(view, w),
        "deliveries": _deliveries(view, w),
        "commitment": _commitments(view, w),
        "notifications": _notifications(view, w),
        "sync": _sync(view, w),
        "conflicts": _conflicts(view, w),
        "refused_records": _refused(view, w),
        "fleet": _fleet(view, w),
        "peers": _peers(view, w),
        "tls": _tls(view, w),
        "models": _models(view, w),
        "model_versions": _model_versions(view, w),
        "processes": _processes(view, w),
        "schedule": _schedule(view, w),
        "events": _events(view, w),
    }
    links = (element("a", w(key), href=f"#{key}") for key, section in sections.items() if section is not None)
    contents = element("nav", *links, class_="contents", aria_label=w("contents"))
    main = element("main", _numbers(view, w), contents, *sections.values(), id="main")
    footer = element(
        "footer",
        element("p", w("disclaimer"), " ", w("utc")),
        element("p", w("no_changes")) if not view.changes_allowed else None,
        element(
            "p", f"dicomnode {view.report['node']['version']} · {w('updated')} ", _time(view.report["node"]["time"])
        ),
    )
    skip = element("a", w("skip"), href="#main", class_="skip")
    body = element("body", skip, header, main, footer, data_refresh=str(view.refresh_seconds))
    return document(element("html", head, body, lang=_TAGS[view.language]))


Words = Callable[[str], str]


def _numbers(view: View, w: Words) -> Markup:
    report, jobs, deliveries = view.report, view.report["jobs"], view.report["deliveries"]
    failed = jobs["failed"] + jobs["refused"]
    cards: list[tuple[str, Child, str]] = [
        ("studies", report["instances"]["studies"], ""),
        ("series", report["instances"]["series"], ""),
        ("instances", report["instances"]["instances"], ""),
        ("waiting_jobs", jobs["pending"], _over(view, "oldest_job_minutes", report["oldest_job_seconds"] / 60)),
        ("running_jobs", jobs["running"], ""),
        ("failed_jobs", failed, "bad" if failed else ""),
        ("waiting_deliveries", deliveries["pending"] + deliveries["sending"], ""),
        ("uncommitted_deliveries", deliveries["committing"], ""),
        ("rejected_deliveries", deliveries["rejected"], "bad" if deliveries["rejected"] else ""),
        ("disk_free", _size(report["disk"]["free_mb"]), "" if _disk_well(view) else "bad"),
    ]
    waits = max((lane["oldest_seconds"] for lane in report["cloud"]["waiting"]), default=0.0) / 3600
    if report["cloud"]["configured"]:
        items = sum(lane["count"] for lane in report["cloud"]["waiting"])
        cards.append(("waiting_cloud", items, _over(view, "oldest_sync_hours", waits)))
    reviews = sum(report["reviews"].values())
    if reviews:
        cards.append(("open_reviews", reviews, _over(view, "open_reviews", reviews)))
    return element(
        "section",
        *(
            element("div", element("b", value), element("span", w(key)), class_=f"card {tone}")
            for key, value, tone in cards
        ),
        class_="cards",
    )


def _over(view: View, limit: str, value: float) -> str:
    """The tone of a figure: bad beyond the limit that people set (record ``limits/warnings``)."""
    found = view.limits.get(limit)
    return "bad" if found is not None and value > found else ""


def _disk_well(view: View) -> bool:
    disk, limit = view.report["disk"], view.limits.get("disk_free_mb")
    return bool(disk["above_reserve"]) and (limit is None or disk["free_mb"] >= limit)


def _checks(view: View, w: Words) -> Markup:
    items = (
        element(
            "li",
            _pill("ok" if check.ok else "problem", w),
            element("b", w(name)),
            element("span", phrase(check.detail, view.language)),
            element("em", phrase(check.hint, view.language)) if check.hint and not check.ok else None,
        )
        for name, check in view.checks.items()
    )
    return _section("checks", w, element("ul", *items, class_="checks"))


def _jobs(view: View, w: Words) -> Markup:
    priorities = {number: name for name, number in PRIORITIES.items()}
    rows = [
        [
            str(job["id"]),
            element("code", uid_hash(job["StudyInstanceUID"])),
            join(job["model"], " ", element("small", job["model_version"] or job["step"])),
            str(job["revision"]),
            str(job["instances"]),
            w(priorities.get(job["priority"], "")),
            join(_pill(job["state"], w), " ", element("b", w("critical"), class_="pill bad"))
            if job["critical"]
            else _pill(job["state"], w),
            placement_cell(job["engine"], job["placement"], w),
            element("span", phrase(job["reason"], view.language), class_="reason") if job["reason"] else None,
            _error(job["last_error"], view),
            _time(job["created_time"]),
            _retry(view, w, "jobs", job, ("failed", "refused")),
        ]
        for job in view.jobs
    ]
    heads = ["id", "study", "model", "revision", "instances", "priority", "state", "ran_on", "reason", "error"]
    return _section("jobs", w, _table([*heads, "created", ""], rows, w))


def _deliveries(view: View, w: Words) -> Markup:
    return _section("deliveries", w, _outbox(view, w, "deliveries", view.deliveries))


def _commitments(view: View, w: Words) -> Markup | None:
    """Storage commitment in both roles; only where there is any."""
    if not view.commitments:
        return None
    retried = {"scp": ("rejected", "reported", "pending"), "scu": ("waiting", "pending")}
    rows = [
        [
            str(row["id"]),
            w("asked_by" if row["role"] == "scp" else "asked_of").format(row["peer"]),
            str(row["instances"]),
            "" if row["failed"] is None else str(row["failed"]),
            _pill(row["state"], w),
            str(row["attempts"]),
            _error(row["last_error"], view),
            _time(row["created_time"]),
            _retry(view, w, "commitments", row, retried[row["role"]]),
        ]
        for row in view.commitments
    ]
    heads = ["id", "asked", "instances", "not_committed", "state", "attempts", "error", "created"]
    return _section("commitment", w, _table([*heads, ""], rows, w))


def _notifications(view: View, w: Words) -> Markup | None:
    """Only where a rule asks for them."""
    if not view.notifications:
        return None
    return _section("notifications", w, _outbox(view, w, "notifications", view.notifications))


def _sync(view: View, w: Words) -> Markup:
    if not view.settings.cloud.stow_url and not view.sync:
        return _section("sync", w, element("p", w("sync_off"), class_="empty"))
    return _section("sync", w, join(*_cloud(view, w), _outbox(view, w, "sync", view.sync)))


def _fleet(view: View, w: Words) -> Markup | None:
    lines = fleet_lines(view.report, w, pill=_pill, say=lambda text: phrase(text, view.language))
    return None if lines is None else _section("fleet", w, lines)


def _cloud(view: View, w: Words) -> list[Markup]:
    """State of the line, its endpoints, and what waits in each class."""
    cloud = view.report["cloud"]
    endpoints = [
        [
            e["name"],
            _pill("well" if e["well"] else "away" if e["error"] else "untried", w),
            w("yes" if e["in_use"] else "no"),
            "" if e["latency_seconds"] is None else f"{e['latency_seconds'] * 1000:.0f} ms",
            _error(e["error"], view),
        ]
        for e in cloud["endpoints"]
    ]
    waiting = [
        [
            w(f"class_{one['class']}"),
            str(one["count"]),
            _size(int(one["bytes"]) >> 20),
            w("ago").format(f"{one['oldest_seconds']:.0f}"),
        ]
        for one in cloud["waiting"]
        if one["count"]
    ]
    mode = w(f"mode_{cloud['mode']}")
    parts = [element("p", _pill(cloud["state"], w), f" {w('offline_mode')}: {mode}")]
    if endpoints:
        parts.append(_table(["name", "state", "in_use", "latency", "error"], endpoints, w))
    if waiting:
        parts.append(_table(["class", "waiting", "size", "oldest"], waiting, w))
    if cloud["spool_full"]:
        parts.append(element("p", _pill("waiting", w), " " + w("spool_full").format(cloud["spool_bytes"] >> 20)))
    return parts


def _conflicts(view: View, w: Words) -> Markup | None:
    """Only where there are any."""
    if not view.conflicts:
        return None
    return _section("conflicts", w, conflicts_table(view.conflicts, w, pill=_pill, table=_table))


def _refused(view: View, w: Words) -> Markup | None:
    """Only where there are any."""
    if not view.refused:
        return None
    table = refused_table(view.refused, w, table=_table, say=lambda text: phrase(text, view.language))
    return _section("refused_records", w, table)


def _identity(item: Mapping[str, Any], w: Words) -> str | None:
    """Whether a patient's identity leaves; nothing where an item is of no patient."""
    if item["kind"] in _OF_NOBODY:
        return None
    return w("kept" if item["identified"] else "removed")


def _outbox(view: View, w: Words, collection: str, items: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        [
            str(item["id"]),
            item["destination"],
            w(f"record_{item['kind']}") if item["kind"] in _RECORD_ITEMS else item["kind"],
            element("code", uid_hash(item["StudyInstanceUID"])) if item["StudyInstanceUID"] else None,
            _pill(item["state"], w),
            str(item["attempts"]),
            _error(item["last_error"], view),
            *([_identity(item, w)] if "identified" in item else []),
            _time(item["created_time"]),
            _retry(view, w, collection, item, ("rejected", "pending", "committing")),
        ]
        for item in items
    ]
    identity = ["identity"] if items and "identified" in items[0] else []
    heads = ["id", "destination", "kind", "study", "state", "attempts", "error", *identity, "created"]
    return _table([*heads, ""], rows, w)


def _peers(view: View, w: Words) -> Markup:
    waiting: dict[str, int] = {}
    for row in view.report["destinations"]:
        if row["outbox"] == "deliveries" and row["state"] in {"pending", "sending"}:
            waiting[row["destination"]] = waiting.get(row["destination"], 0) + row["count"]
    rows = [
        [
            peer.name,
            element("code", peer.ae_title),
            f"{peer.host}:{peer.port}" if peer.port else peer.host,
            " ".join(peer.allow),
            w("yes" if peer.commitment else "no"),
            str(waiting.get(peer.name, 0)),
        ]
        for peer in view.settings.peers
    ]
    return _section("peers", w, _table(["name", "ae_title", "address", "services", "commitment", "waiting"], rows, w))


def _tls(view: View, w: Words) -> Markup:
    tls = view.report["tls"]
    own, peers = tls["certificate"], tls["peers"]
    if tls["port"] is None and own is None and not peers:
        return _section("tls", w, element("p", w("tls_off"), class_="empty"))
    port = w("tls_sending_only") if tls["port"] is None else w("tls_port").format(tls["port"])
    certificates = [(element("b", w("this_node")), own["subject"], own)] if own else []
    certificates += [(element("span", peer["peer"]), "", peer) for peer in peers]
    rows = [
        [name, subject, _pill(one["state"], w), _time(one["not_after"]), str(one["days_left"])]
        for name, subject, one in certificates
    ]
    table = _table(["name", "subject_name", "state", "valid_until", "days_left"], rows, w)
    return _section("tls", w, join(element("p", port), element("p", _error(tls["fault"])), table))


def _models(view: View, w: Words) -> Markup:
    models = view.report["models"]
    names = sorted({*models["active"], *models["serving"], *models["wanted"], *models["failed"]})
    rows = [
        [
            name,
            models["active"].get(name, ""),
            join(*(f"{models['serving'].get(name, {}).get(key, '')} " for key in ("version", "engine"))),
            w("yes" if name in models["wanted"] else "no"),
            _error(models["failed"].get(name)),
        ]
        for name in names
    ]
    table = _table(["model", "active", "serving", "wanted", "error"], rows, w)
    trust = _repository(models["repository"], w)
    if not models["pulls"]:
        return _section("models", w, join(table, trust))
    pulls = [
        [p["name"], p["version"], _pill(p["state"], w), str(p["attempts"]), _error(p["last_error"])]
        for p in models["pulls"]
    ]
    heads = ["model", "version", "state", "attempts", "error"]
    return _section("models", w, join(table, trust, element("h3", w("pulls")), _table(heads, pulls, w)))


def _repository(trust: Mapping[str, Any], w: Words) -> Markup | None:
    """One line: how the signed repository stands, until when, and why not."""
    if not trust:
        return None
    ends = join(" ", w("valid_until"), " ", _time(trust["expires_time"])) if trust.get("expires_time") else None
    name = element("b", w("model_repository"))
    return element("p", name, " ", _pill(trust["state"], w), ends, " ", _error(trust["reason"] or None))


def _model_versions(view: View, w: Words) -> Markup:
    parts = [
        versions_table(
            view.model_versions,
            view.model_figures,
            w,
            pill=_pill,
            table=_table,
            changes_allowed=view.changes_allowed,
        )
    ]
    if view.model_comparisons:
        table = comparisons_table(view.model_comparisons, w, pill=_pill, table=_table)
        parts += [element("h3", w("comparisons")), table]
    if view.model_history:
        parts += [element("h3", w("history")), history_table(view.model_history, w, pill=_pill, table=_table)]
    return _section("model_versions", w, join(*parts))


def _processes(view: View, w: Words) -> Markup:
    rows = [
        [
            process["name"],
            _pill(process["state"] if process["alive"] or process["state"] != "ready" else "silent_state", w),
            str(process["pid"]),
            w("ago").format(f"{process['silent_seconds']:.0f}"),
            _time(process["started_time"]),
        ]
        for process in view.report["processes"]
    ]
    return _section("processes", w, _table(["name", "state", "pid", "silent", "started"], rows, w))


def _schedule(view: View, w: Words) -> Markup:
    rows = [
        [
            name,
            _time(task.get("last_time") or ""),
            f"{float(task.get('seconds') or 0):.2f} s",
            str(task.get("runs", 0)),
            _error(task.get("error")),
        ]
        for name, task in sorted(view.report["scheduled"].items())
    ]
    return _section("schedule", w, _table(["name", "last_run", "duration", "runs", "error"], rows, w))


def _events(view: View, w: Words) -> Markup:
    rows = [
        [_time(e["time"]), _pill(e["severity"], w), e["kind"], e["subject"], e["text"]] for e in view.report["events"]
    ]
    return _section("events", w, _table(["time", "severity", "kind", "subject", "text"], rows, w))


def _section(key: str, w: Words, content: Markup) -> Markup:
    """``key``: of its title, and its anchor."""
    return element("section", element("h2", w(key)), content, id=key, aria_label=w(key))


def _table(keys: Sequence[str], rows: Sequence[Iterable[Child]], w: Words) -> Markup:
    if not rows:
        return element("p", w("nothing"), class_="empty")
    titles = [w(key) if key else "" for key in keys]
    head = element("thead", element("tr", *(element("th", title, scope="col") for title in titles)))
    body = element("tbody", *(element("tr", *_cells(row, titles)) for row in rows))
    # A box that scrolls must be reachable by the keyboard (WCAG 2.1.1).
    return element("div", element("table", head, body), class_="scroll", tabindex="0")


def _cells(row: Iterable[Child], titles: Sequence[str]) -> Iterator[Markup]:
    """With the column's title, which narrow screens show in front of each value."""
    for cell, title in zip(row, titles, strict=True):
        yield element("td", cell, data_label=title or None)


def _pill(state: str, w: Words) -> Markup:
    return element("span", w(state), class_=f"pill {tone_of(state)}")


def _retry(view: View, w: Words, collection: str, row: Mapping[str, Any], states: tuple[str, ...]) -> Markup | None:
    if not view.changes_allowed or row["state"] not in states:
        return None
    number = int(row["id"])
    path, spoken = f"/api/v1/{collection}/{number}/retry", f"{w('retry')} {w(collection)} {number}"
    return element("button", w("retry"), type="button", data_retry=path, aria_label=spoken)


def _error(text: str | None, view: View | None = None) -> Markup | None:
    """``view``: in whose language it is told, where its sentence is known."""
    if not text:
        return None
    told = phrase(text, view.language) if view else text
    return element("span", told, class_="error long" if len(told) > 24 else "error")


def _time(moment: str | None) -> Markup | None:
    """ISO time, seconds are enough to read."""
    return element("time", moment[:19].replace("T", " "), datetime=moment) if moment else None


def _size(mebibytes: int) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes} MiB"
