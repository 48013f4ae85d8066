"""What must hold after a campaign: RELIABILITY.md's invariant, looked at from outside and in the node's own store."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw
from pydicom import Dataset, dcmread
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as FindModel

from dicomnode import durable
from dicomnode.clock import SystemClock
from dicomnode.custody.sweep import GRACE_SECONDS, Sweeper
from dicomnode.index.database import Database, rows_of
from scripts.crashing.kills import Campaign, Setup
from scripts.crashing.load import Account
from scripts.crashing.series import Made
from tests.e2e.harness import Node
from tests.peers import data_set_of
from tests.reactor import park


@dataclass(slots=True)
class Verdict:
    """``wrong`` is empty when every promise held."""

    acknowledged: int = 0
    objects: int = 0
    results: int = 0
    revisions: Counter[int] = field(default_factory=Counter)
    strays: int = 0
    unfinished: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


def judge(setup: Setup, campaign: Campaign) -> Verdict:
    """Ask the running node, stop it, then look at what it left."""
    verdict, account = Verdict(), campaign.account()
    node = setup.node
    verdict.acknowledged, verdict.objects = account.answers, len(account.acknowledged)
    if not account.finished:
        verdict.wrong.append("a sender did not finish")
    verdict.wrong += _found_by_query(node, [*campaign.series, *campaign.small], account)
    for made in campaign.series:
        verdict.wrong += _analysed_once(node, made, verdict)
    code = node.stop()
    if code != 0:
        verdict.wrong.append(f"the node ended with {code}")
    connection = apsw.Connection(str(node.data_dir / "index.sqlite"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        verdict.wrong += _index_whole(connection)
        rows = rows_of(connection, "SELECT * FROM instances")
        verdict.wrong += _stored(node, rows, account, verdict)
        verdict.wrong += _delivered(setup.pacs.files(), rows, rows_of(connection, "SELECT * FROM results"), verdict)
    finally:
        connection.close()
    verdict.wrong += _moved(setup.mover.files(), account)
    verdict.wrong += _swept(node.data_dir, verdict)
    return verdict


def _index_whole(connection: apsw.Connection) -> Iterator[str]:
    for row in connection.execute("PRAGMA integrity_check(5)"):
        if row[0] != "ok":
            yield f"integrity_check: {row[0]}"
    for row in connection.execute("PRAGMA foreign_key_check"):
        yield f"foreign_key_check: a row of {row[0]}"


def _stored(node: Node, rows: Sequence[dict[str, Any]], account: Account, verdict: Verdict) -> Iterator[str]:
    """Acknowledged => stored, byte-equal. Not acknowledged => absent or whole."""
    by_uid = {row["SOPInstanceUID"]: row for row in rows}
    for uid, serving in account.serving.items():
        row = by_uid.get(uid)
        if row is None:
            if uid in account.acknowledged:
                verdict.lost += 1
                yield "an acknowledged object has no row"
            continue
        part10 = _read(node.data_dir / "objects" / row["file"])
        digest = hashlib.sha256(data_set_of(part10)).hexdigest() if part10 else ""
        if digest != row["dataset_sha256"]:
            verdict.lost += uid in account.acknowledged
            yield "an object's file is gone or differs from its row"
        elif digest not in account.sent[uid]:
            yield "an object is stored that nobody sent"
        elif digest not in serving:
            yield "an older version serves than was acknowledged last"
    for row in rows:
        if row["SOPInstanceUID"] not in account.sent:
            part10 = _read(node.data_dir / "objects" / row["file"])
            if part10 is None or hashlib.sha256(data_set_of(part10)).hexdigest() != row["dataset_sha256"]:
                yield "a result's file is gone or differs from its row"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _analysed_once(node: Node, made: Made, verdict: Verdict) -> Iterator[str]:
    """One finished job for each set of images; the newest has all of them; SEG and SR of each."""
    jobs = [j for j in node.jobs(made.series_uid) if j["state"] == "done"]
    verdict.revisions[len(jobs)] += 1
    if len({j["inputs_sha256"] for j in jobs}) != len(jobs):
        yield "the same images were analysed twice"
    if not jobs:
        yield "a series was not analysed"
        return
    inputs = node.rows("SELECT SOPInstanceUID FROM job_inputs WHERE job_id = ?", (jobs[-1]["id"],))
    if {r["SOPInstanceUID"] for r in inputs} != {i.sop_instance_uid for i in made.items}:
        yield "the newest analysis lacks acknowledged images"
    deliveries = node.deliveries(made.series_uid)
    for job in jobs:
        kinds = sorted(d["kind"] for d in deliveries if d["job_id"] == job["id"])
        if kinds != ["SEG", "SR"]:
            yield f"an analysis has the results {kinds}"
    if any(d["state"] != "stored" for d in deliveries):
        yield "a delivery is not done"


def _delivered(
    files: Sequence[Path], rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], verdict: Verdict
) -> Iterator[str]:
    """What the PACS has is what the node made: the same UIDs, each once, the same bytes."""
    hashes = {row["SOPInstanceUID"]: row["dataset_sha256"] for row in rows}
    wanted = {row["SOPInstanceUID"] for row in results}
    verdict.results = len(wanted)
    there: Counter[str] = Counter()
    for path in files:
        uid = str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
        there[uid] += 1
        if hashlib.sha256(data_set_of(path.read_bytes())).hexdigest() != hashes.get(uid):
            yield "the PACS has other bytes than the node"
    if there.keys() != wanted:
        yield f"{len(wanted - there.keys())} results are not at the PACS, {len(there.keys() - wanted)} there are none"
    if any(count > 1 for count in there.values()):
        yield "the PACS has a result twice"


def _moved(files: Sequence[Path], account: Account) -> Iterator[str]:
    """What C-MOVE brought is what was sent; the receiver may have been killed in the middle of a file."""
    for path in files:
        uid = path.name.partition(".")[2]
        whole = hashlib.sha256(data_set_of(path.read_bytes())).hexdigest() if path.stat().st_size > 200 else ""
        if uid in account.sent and whole and whole not in account.sent[uid] and not _torn(path):
            yield "C-MOVE brought other bytes than were sent"


def _torn(path: Path) -> bool:
    """storescp keeps what it has of an object whose sender died."""
    try:
        ds = dcmread(path)
        return len(ds.PixelData) != ds.Rows * ds.Columns * 2
    except Exception:  # noqa: BLE001 however the rest of a cut file fails
        return True


def _found_by_query(node: Node, series: Sequence[Made], account: Account) -> Iterator[str]:
    """Acknowledged => indexed, as a peer sees it: C-FIND of every series lists its images."""
    ae = AE("ASKER")
    ae.add_requested_context(FindModel)
    assoc = ae.associate("127.0.0.1", node.port, ae_title="DICOMNODE")
    if not assoc.is_established:
        yield "the node does not take a query"
        return
    try:
        for made in series:
            keys: Any = Dataset()
            keys.QueryRetrieveLevel = "IMAGE"
            keys.StudyInstanceUID, keys.SeriesInstanceUID, keys.SOPInstanceUID = made.study_uid, made.series_uid, ""
            park(assoc)
            found = {str(i.SOPInstanceUID) for _, i in assoc.send_c_find(keys, FindModel) if i is not None}
            missing = {i.sop_instance_uid for i in made.items} & account.acknowledged.keys() - found
            if missing:
                yield f"C-FIND does not list {len(missing)} acknowledged images of a series"
    finally:
        assoc.release()


class _Later:
    """A clock that a sweep's grace period has passed on."""

    def __init__(self, base: float) -> None:
        self._now = base

    def wall(self) -> datetime:
        return datetime.now().astimezone()

    def ticks(self) -> float:
        return self._now

    def pass_grace(self) -> None:
        self._now += GRACE_SECONDS + 1


def _swept(data_dir: Path, verdict: Verdict) -> Iterator[str]:
    """No file without a row is left beyond what the sweeper clears away, and it clears away nothing else."""
    clock = _Later(SystemClock(0.0).ticks())
    db = Database(data_dir, clock)
    try:
        store = durable.ObjectStore(data_dir)
        named = {r["file"] for t in ("instances", "former_instances") for r in db.rows(f"SELECT file FROM {t}")}
        before = {p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()}
        verdict.unfinished = sum(name.endswith(durable.TEMPORARY_SUFFIX) for name in before - named)
        verdict.strays = len(before - named) - verdict.unfinished
        sweeper = Sweeper(db, store)
        for _ in range(2):
            for _ in range(durable.FANOUT):
                sweeper.run_once()
            clock.pass_grace()
        left = {p.relative_to(store.root).as_posix() for p in store.root.rglob("*") if p.is_file()}
        if left != named:
            yield f"after a sweep {len(left - named)} files have no row and {len(named - left)} rows no file"
    finally:
        db.close()
