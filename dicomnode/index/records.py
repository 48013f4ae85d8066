"""Records that both ends may change: what came from the cloud, what became of it, and conflicts with both sides kept.

Everything is decided in one transaction from committed rows, so it does not matter where a process
ends: what came is a row with its cursor, what is decided is a row, what goes out is an item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dicomnode.clock import iso
from dicomnode.cloud_settings import CloudPlan, Conflicts
from dicomnode.conflicts import KIND_OF, Decision, Outcome, Side, decide, differing, filled_since, returned
from dicomnode.index.cloud_rows import canonical, put_record
from dicomnode.index.database import Database, Row
from dicomnode.index.record_reviews import close, origin_of
from dicomnode.record_shapes import fault

Leave = Callable[[Row], Mapping[str, Any]]
"""What leaves in place of a record of ours: :meth:`dicomnode.sync.departure.Departures.record`."""

BEGUN_AT_CLOUD = frozenset({"preferences", "limits"})
"""Types whose records may begin at the cloud. Of others only what concerns something here is taken."""

TOLD = frozenset({"settings"})
"""What the node says of itself. It is set by the configuration, and by the desired state where that is accepted."""

MOST_SETTLED = 100  # config/cloud-api.yaml
MOST_MISSING = 100
TOGETHER = 20
"""Records that are decided in one commit, which waits for the disk; stores wait for the index meanwhile."""

MOST_KEPT = 10_000
"""Refused records, and conflicts that no person decided."""


class Taken(StrEnum):
    """What became of a record that came.

    ``own``: it is ours. ``later``: something of ours is still on its way. ``stale``: older than what both
    ends had. ``unknown``: it concerns nothing here.
    """

    own = "own"
    applied = "applied"
    kept = "kept"
    merged = "merged"
    review = "review"
    unknown = "unknown"
    refused = "refused"
    later = "later"
    stale = "stale"


@dataclass(frozen=True, slots=True)
class Rules:
    """How records are taken in."""

    plan: CloudPlan
    policy: Conflicts
    leave: Leave


class Records:
    """Incoming records and decisions over one index."""

    def __init__(self, db: Database, rules: Rules) -> None:
        self.db = db
        self.rules = rules
        self._asked = ("", "")

    def after(self, address: str) -> int:
        """Up to where the feed of an endpoint was read."""
        return int(self.db.value("SELECT after_seq FROM record_feeds WHERE address = ?", (address,)) or 0)

    def keep(
        self,
        address: str,
        page: Sequence[Mapping[str, Any]],
        after: int,
        refused: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """A page of the feed and the place behind it, in one transaction; how many records were new.

        ``refused``: records of the page that cannot be kept (``why``, ``type``, ``cloud_id``, ``seq``).
        """
        db, new = self.db, 0
        with db.transaction():
            for r in page:
                new += db.execute(
                    "INSERT INTO cloud_records (type, cloud_id, version, key, node, data, changed_time, settled, seq,"
                    " state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'new') ON CONFLICT (type, cloud_id) DO UPDATE SET"
                    " version = excluded.version, key = excluded.key, node = excluded.node, data = excluded.data,"
                    " changed_time = excluded.changed_time, settled = excluded.settled, seq = excluded.seq,"
                    " state = 'new' WHERE key != excluded.key OR settled != excluded.settled",
                    (r["type"], r["id"], r["version"], r["key"], r["node"], canonical(r["data"]), r["changed_time"],
                     json.dumps(r["settled"]), r["seq"]),
                )  # fmt: skip
            db.execute(
                "INSERT INTO record_feeds VALUES (?, ?) ON CONFLICT (address) DO UPDATE SET after_seq = ?2",
                (address, after),
            )
            for r in refused:
                self._note_refused(address, r)
        return new

    def _note_refused(self, address: str, came: Mapping[str, Any]) -> None:
        db = self.db
        row = {key: came[key] for key in ("seq", "type", "cloud_id", "why")}
        row |= {"address": address, "time": iso(db.clock.wall())}
        db.insert("refused_records", row, conflict="OR REPLACE")
        db.execute(
            "DELETE FROM refused_records WHERE time <"
            " (SELECT time FROM refused_records ORDER BY time DESC LIMIT 1 OFFSET ?)",
            (MOST_KEPT - 1,),
        )

    def take_all(self) -> dict[Taken, int]:
        """Decide on everything that waits; counts by what became of it."""
        found: dict[Taken, int] = {}
        waiting = self.db.rows("SELECT type, cloud_id FROM cloud_records WHERE state = 'new' ORDER BY seq")
        for begin in range(0, len(waiting), TOGETHER):
            for what in self._take_some(waiting[begin : begin + TOGETHER]):
                found[what] = found.get(what, 0) + 1
        if waiting:
            self._forget()
        return found

    def _take_some(self, rows: Sequence[Row]) -> list[Taken]:
        """In one commit; where one of them cannot be looked at, each in its own, and that one is refused."""
        try:
            with self.db.transaction():
                return [self._take(row["type"], row["cloud_id"]) for row in rows]
        except _UNREADABLE:
            if len(rows) == 1:
                return [self.refuse(rows[0]["type"], rows[0]["cloud_id"])]
        return [what for row in rows for what in self._take_some([row])]

    def _forget(self) -> None:
        """The cloud must not fill the disk: of refused records and decided conflicts the newest stay.

        What a person decided always stays.
        """
        db = self.db
        with db.transaction():
            rows = db.rows(
                "SELECT type, cloud_id FROM cloud_records WHERE state = 'refused' ORDER BY seq DESC LIMIT -1 OFFSET ?",
                (MOST_KEPT,),
            )
            for row in rows:
                db.execute(f"DELETE FROM cloud_records WHERE {_CAME}", (row["type"], row["cloud_id"]))
            decided = "state = 'decided' AND decided_by IN ('policy', 'the cloud')"
            db.execute(
                f"DELETE FROM record_conflicts WHERE {decided} AND id <="
                f" (SELECT id FROM record_conflicts WHERE {decided} ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (MOST_KEPT,),
            )

    def refuse(self, kind: str, cloud_id: str, why: str = "it cannot be looked at") -> Taken:
        """A record that cannot be looked at; it is not asked for again."""
        with self.db.transaction():
            return self._done({"type": kind, "cloud_id": cloud_id}, self._home(kind, cloud_id), Taken.refused, why)

    def _take(self, kind: str, cloud_id: str) -> Taken:
        db = self.db
        with db.transaction():
            came = db.row("SELECT * FROM cloud_records WHERE type = ? AND cloud_id = ?", (kind, cloud_id))
            assert came is not None
            name = self._home(kind, cloud_id)
            if name is None:
                return self._done(came, None, Taken.unknown)
            if db.row(
                f"SELECT 1 AS one FROM sync_items WHERE {_ITEM} AND state IN ('pending', 'sending')", (kind, name)
            ):
                return Taken.later
            held = db.row("SELECT * FROM records WHERE type = ? AND record_id = ?", (kind, name))
            settled = json.loads(came["settled"])
            self._decided_there(kind, name, settled)
            ours = "SELECT 1 AS one FROM sync_items WHERE idempotency_key = ?"
            if held is not None and (came["key"] in (held["common_key"], held["key"]) or db.row(ours, (came["key"],))):
                self._settle_late(kind, name, held, settled)
                return self._done(came, name, Taken.own)
            if self._stale(came, held, name):
                return self._done(came, name, Taken.stale)
            theirs = json.loads(came["data"])
            if why := fault(kind, name, theirs, json.loads(held["data"]) if held else None):
                return self._done(came, name, Taken.refused, why)
            return self._done(came, name, self._decide(came, name, held, theirs, settled))

    def _settle_late(self, kind: str, name: str, held: Row, settled: list[str]) -> None:
        """An old change was parked and sent again when others had taken its place: what serves is told once more."""
        keys = [k for k in self.unsettled(kind, name) if k not in settled]
        if keys:
            data, origin = json.loads(held["data"]), origin_of(self.db, kind, name)
            put_record(self.db, self.rules.plan, kind, name, data, reported=False, settles=keys, **origin)

    def look_again(self, kind: str, cloud_id: str) -> None:
        """A record that was looked at before, since something of ours turned out to be in conflict with it."""
        with self.db.transaction():
            where = "type = ? AND cloud_id = ? AND state = 'taken'"
            self.db.execute(f"UPDATE cloud_records SET state = 'new' WHERE {where}", (kind, cloud_id))

    def _stale(self, came: Row, held: Row | None, name: str) -> bool:
        """An endpoint that is behind, a backup or one that was set back: what it lacks it gets by the next change."""
        behind = held is not None and came["version"] <= held["common_version"]
        return behind and not self.unsettled(came["type"], name)

    def _decide(self, came: Row, name: str, held: Row | None, theirs: Mapping[str, Any], settled: list[str]) -> Taken:
        kind = str(came["type"])
        origin = origin_of(self.db, kind, name)
        home: dict[str, Any] = json.loads(held["data"]) if held else {}
        allowed = self._wire(kind, name, origin, {**theirs, **home})
        cloud = Side(came["version"], came["changed_time"], {k: v for k, v in theirs.items() if k in allowed})
        if held is None:
            self._write(kind, name, came, returned({}, {}, cloud.data))
            return Taken.applied
        if kind in TOLD:
            return self._tell_again(came, name, home, settled, origin)
        ours = self._wire(kind, name, origin, home)
        edge = Side(held["version"], held["changed_time"], ours)
        common = None
        if held["common_data"] is not None:
            before = self._wire(kind, name, origin, json.loads(held["common_data"]))
            common = Side(held["common_version"], held["common_time"] or "", before)
        strategy = self.rules.policy.strategy(kind)
        made = decide(strategy, edge, cloud, common, now=self.db.clock.wall(), limits=self.rules.policy.limits)
        keys = [k for k in self.unsettled(kind, name) if k not in settled]
        taken = returned(home, ours, cloud.data)
        self._write(kind, name, came, taken)
        if made.conflict:
            self._note(came, name, held, made, strategy, home, taken, keys)
        if made.outcome is Outcome.review:
            return Taken.review
        data = made.data
        if common is not None and made.conflict and made.outcome in (Outcome.edge, Outcome.cloud):
            sides = (ours, cloud.data) if made.outcome is Outcome.edge else (cloud.data, ours)
            data = {**data, **filled_since(*sides, common.data)}
        serves = returned(home, ours, data)
        if differing(serves, taken) or keys:
            put_record(self.db, self.rules.plan, kind, name, serves, reported=False, settles=keys, **origin)
        return {Outcome.edge: Taken.kept, Outcome.merged: Taken.merged}.get(made.outcome, Taken.applied)

    def _tell_again(self, came: Row, name: str, home: Row, settled: list[str], origin: Mapping[str, Any]) -> Taken:
        """Nobody sets this by a record: the cloud hears what is so, as a change that follows its own."""
        kind, keys = str(came["type"]), [k for k in self.unsettled(came["type"], name) if k not in settled]
        self._write(kind, name, came, json.loads(came["data"]))
        put_record(self.db, self.rules.plan, kind, name, home, reported=False, settles=keys, **origin)
        return Taken.kept

    def _write(self, kind: str, name: str, came: Row, data: Mapping[str, Any]) -> None:
        """The cloud's value is what both ends have now; what goes out next builds on it."""
        text = canonical(data)
        self.db.execute(
            "INSERT INTO records (type, record_id, version, data, changed_time, key, common_version, common_data,"
            " common_key, common_time) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?3, ?4, ?6, ?5) ON CONFLICT (type, record_id)"
            " DO UPDATE SET version = ?3, data = ?4, changed_time = ?5, key = ?6, common_version = ?3,"
            " common_data = ?4, common_key = ?6, common_time = ?5",
            (kind, name, came["version"], text, came["changed_time"], came["key"]),
        )

    def _note(
        self, came: Row, name: str, held: Row, made: Decision, strategy: str, home: Row, taken: Row, keys: list[str]
    ) -> None:
        db, moment = self.db, iso(self.db.clock.wall())
        review = made.outcome is Outcome.review
        db.insert(
            "record_conflicts",
            {
                "type": came["type"],
                "record_id": name,
                "strategy": str(strategy),
                "outcome": str(made.outcome),
                "why": made.why,
                "fields": json.dumps(made.fields),
                "keys": json.dumps(keys),
                "edge_version": held["version"],
                "edge_time": held["changed_time"],
                "edge_data": canonical(home),
                "cloud_version": came["version"],
                "cloud_time": came["changed_time"],
                "cloud_data": canonical(taken),
                "cloud_node": came["node"],
                "common_version": held["common_version"],
                "common_data": held["common_data"],
                "state": "open" if review else "decided",
                "decided_as": None if review else str(made.outcome),
                "decided_by": None if review else "policy",
                "created_at": db.clock.ticks(),
                "created_time": moment,
                "decided_time": None if review else moment,
            },
        )

    def _decided_there(self, kind: str, name: str, settled: list[str]) -> None:
        """Reviews that are open here and were closed at the cloud."""
        query = "SELECT id, keys FROM record_conflicts WHERE type = ? AND record_id = ? AND state = 'open'"
        for row in self.db.rows(query, (kind, name)):
            keys = json.loads(row["keys"])
            if keys and set(keys) <= set(settled):
                close(self.db, row["id"], "cloud", "the cloud")

    def unsettled(self, kind: str, name: str) -> list[str]:
        """Keys of our changes that are in conflict at the cloud, but for those under review here."""
        query = f"SELECT idempotency_key, settles, outcome FROM sync_items WHERE {_ITEM} ORDER BY id"
        items = self.db.rows(query, (kind, name))
        gone = {k for i in items if i["outcome"] == "stored" for k in json.loads(i["settles"] or "[]")}
        open_here = "SELECT keys FROM record_conflicts WHERE type = ? AND record_id = ? AND state = 'open'"
        gone |= {k for c in self.db.rows(open_here, (kind, name)) for k in json.loads(c["keys"])}
        found = [i["idempotency_key"] for i in items if i["outcome"] in _CONFLICT]
        found += [k for i in items if i["outcome"] in _CONFLICT for k in json.loads(i["settles"] or "[]")]
        return [k for k in dict.fromkeys(found) if k not in gone][-MOST_SETTLED:]

    def _wire(self, kind: str, name: str, origin: Mapping[str, Any], data: Mapping[str, Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.rules.leave(self._item(kind, name, origin, data))["data"]
        return found

    @staticmethod
    def _item(kind: str, name: str, origin: Mapping[str, Any], data: Mapping[str, Any]) -> Row:
        item = dict.fromkeys(("idempotency_key", "version", "base_version", "base_key", "settles", "changed_time"))
        return {**item, "type": kind, "record_id": name, "data": canonical(data), **origin}

    def _home(self, kind: str, cloud_id: str) -> str | None:
        """The id here of a record that came; None where it concerns nothing here."""
        if kind not in KIND_OF:
            return None
        owner = "ai-result" if kind == "result-review" else kind
        if self.db.row("SELECT 1 AS one FROM records WHERE type = ? AND record_id = ?", (owner, cloud_id)):
            return cloud_id
        found = self.db.value("SELECT original FROM pseudonyms WHERE pseudonym = ? AND kind = ?", (cloud_id, owner))
        if found is not None:
            return cloud_id if kind == "patient" else str(found)
        return cloud_id if kind in BEGUN_AT_CLOUD else None

    def _done(self, came: Row, name: str | None, what: Taken, why: str = "") -> Taken:
        """What concerns nothing here is not kept: it may be another node's patient; of what is refused, the name."""
        where = (came["type"], came["cloud_id"])
        if what is Taken.unknown:
            self.db.execute(f"DELETE FROM cloud_records WHERE {_CAME}", where)
            return what
        if what is Taken.refused:
            emptied = "state = 'refused', data = '{}', settled = '[]'"
            self.db.execute(f"UPDATE cloud_records SET {emptied} WHERE {_CAME}", where)
            self._note_refused("", {"seq": 0, **came, "why": why})
        else:
            self.db.execute(f"UPDATE cloud_records SET state = 'taken' WHERE {_CAME}", where)
        self.db.execute(
            f"UPDATE sync_items SET outcome = 'taken' WHERE {_ITEM} AND outcome = 'conflict'", (came["type"], name)
        )
        return what

    def missing(self) -> list[tuple[str, str]]:
        """Type and id at the cloud of records whose other side has not come: it concerned nothing here before.

        At most MOST_MISSING; the next call goes on behind them, for some may never be there, and begins anew at
        the end.
        """
        rows = self.db.rows(
            "SELECT DISTINCT type, record_id FROM sync_items WHERE outcome = 'conflict' AND record_id IS NOT NULL"
            " AND (type, record_id) > (?, ?) ORDER BY type, record_id LIMIT ?",
            (*self._asked, MOST_MISSING),
        )
        last = rows[-1] if len(rows) == MOST_MISSING else {"type": "", "record_id": ""}
        self._asked = last["type"], last["record_id"]
        found = []
        for r in rows:
            item = self._item(r["type"], r["record_id"], origin_of(self.db, r["type"], r["record_id"]), {})
            found.append((str(r["type"]), str(self.rules.leave(item)["id"])))
        waiting = "SELECT 1 AS one FROM cloud_records WHERE type = ? AND cloud_id = ? AND state = 'new'"
        return [one for one in found if not self.db.row(waiting, one)]


_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, AssertionError)
"""What code raises over content that it was not made for; not what a database, a disk or a key raises."""

_CONFLICT = ("conflict", "taken")
_CAME = "type = ? AND cloud_id = ?"
_ITEM = "type = ? AND record_id = ?"
