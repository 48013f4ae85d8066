"""Model pull: download, digest, unpack, verify, place, activate. In this order.

The version that serves is not touched until the new one has passed everything. Each
archive has one row, by digest: ``pending`` (waits for the next attempt), ``activated`` or
``placed`` (for good: a version that the operator rolled back is not activated again), ``removed``
(placed once, gone from the disk since; see :mod:`dicomnode.sync.prune`) or ``rejected`` (wrong digest, unsafe
archive, failed golden case; not tried again until its settings change).

Two are fetched at a time, never two of one model, the shortest first; so a huge one over a slow line does not
hold up an urgent one, nor what was found meanwhile. Bundles are verified one by one: a golden case takes a core.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp

from dicomnode import doorbell, durable, logs, metrics
from dicomnode.clock import iso
from dicomnode.errors import BundleError, EngineError, NodeError, StorageError
from dicomnode.index.database import Database, Row
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models
from dicomnode.index.states import backoff_seconds
from dicomnode.ladder import Plan
from dicomnode.metrics import PullOutcome
from dicomnode.offline import longest_wait, may_ask
from dicomnode.settings import ModelPull, Settings
from dicomnode.sync import transfer
from dicomnode.sync.archive import MEBIBYTE, Caps, unpack
from dicomnode.sync.source import Again, source_for

AT_ONCE = 2
BACKOFF_SECONDS = 10.0
LOOK_SECONDS = 30.0
"""Between two looks for what else is wanted while archives come."""

SYNC = "sync"
"""``who`` of what the sidecar does by itself."""
Verify = Callable[[Path], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One archive. ``signed``: the repository vouches for it, so a wrong byte is the line's fault and passes."""

    name: str
    version: str
    url: str
    sha256: str
    plan: Plan
    length: int | None = None
    signed: bool = False
    by_version: bool = False
    """An entry of the settings names this very version."""


class Offered(Protocol):
    """What the repository vouches for and the settings follow; with ``stale`` also what it does not any more."""

    def __call__(self, *, stale: bool = False) -> Sequence[Wanted]: ...


def nothing(*, stale: bool = False) -> Sequence[Wanted]:
    """Without a repository."""
    del stale
    return ()


def named(entry: ModelPull) -> Wanted:
    """The archive of an entry that has a URL."""
    return Wanted(entry.name, entry.version, entry.url, entry.sha256, entry.plan, by_version=True)


@dataclass(frozen=True, slots=True)
class Places:
    """Paths of one pull. All on the volume of data_dir, so that renaming is atomic."""

    archive: Path
    work: Path
    final: Path


def places(data_dir: Path, wanted: Wanted) -> Places:
    staging = data_dir / "staging" / "models"
    return Places(
        archive=staging / f"{wanted.sha256}.part",
        work=staging / wanted.sha256,
        final=data_dir / "models" / wanted.name / wanted.version,
    )


def fingerprint(wanted: Wanted, max_bundle_mb: int) -> str:
    """Short mark of the settings of one pull; kept with a rejection to notice a change."""
    text = "\n".join([wanted.name, wanted.version, wanted.url, wanted.sha256, str(max_bundle_mb)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_due(row: Row | None, mark: str, now: float, *, by_version: bool = False) -> bool:
    """Whether to try now; pure. ``mark`` is the :func:`fingerprint`, ``now`` node time.

    What was removed from the disk comes back where an entry names its version.
    """
    if row is None:
        return True
    if row["state"] in ("activated", "placed"):
        return False
    if row["state"] == "removed":
        return by_version
    if row["state"] == "rejected":
        return not str(row["last_error"] or "").endswith(f"[{mark}]")
    return bool(now >= float(row["next_at"] or 0.0))


class ModelPuller:
    """``verify(path)`` raises BundleError or EngineError; it runs in a thread of its own."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        verify: Verify,
        offered: Offered = nothing,
    ) -> None:
        self.offered = offered
        self.cloud = settings.cloud
        self.data_dir = settings.node.data_dir
        self._own = settings.inference.models_dir
        self.reserve = settings.node.reserve_mb * MEBIBYTE
        self.longest = settings.delivery.backoff_max_seconds
        self.db = db
        self.models = Models(db)
        self.verify = verify
        self._mode = settings.sync.offline_mode
        self._installing = asyncio.Lock()
        self._coming: dict[str, Wanted] = {}
        self._news = asyncio.Event()
        self._log = logs.get()

    def start(self) -> None:
        """Drop what was staged for what nobody wants any more."""
        self._sweep()

    def look_again(self) -> None:
        """Something else may be wanted than before; in the event loop, also while archives come."""
        self._news.set()

    def _sweep(self) -> None:
        """Of what is wanted no more also the part that was fetched goes; what is in use stays."""
        wanted = {w.sha256 for w in self._wanted(stale=True)} | set(self._coming)
        kept = {f"{sha256}{end}" for sha256 in wanted for end in ("", ".part", ".etag")}
        staging = self.data_dir / "staging" / "models"
        for entry in staging.iterdir() if staging.is_dir() else ():
            if entry.name not in kept:
                self._tell_abandoned(entry)
                durable.remove_tree(entry) if entry.is_dir() else durable.remove(entry)

    def _tell_abandoned(self, entry: Path) -> None:
        row = self.models.pull(entry.stem)
        if row is not None and row["state"] == "pending" and entry.suffix == ".part":
            self.models.forget_pull(entry.stem)
            text = "not wanted any more: what was fetched of it is removed"
            Events(self.db).add("info", "model", f"{row['name']}@{row['version']}", text)

    def _wanted(self, *, stale: bool = False) -> list[Wanted]:
        """Archives with a URL of their own, then what the repository offers."""
        return [*(named(entry) for entry in self.cloud.models if entry.url), *self.offered(stale=stale)]

    def _mark(self, wanted: Wanted) -> str:
        return fingerprint(wanted, self.cloud.max_bundle_mb)

    async def run_once(self) -> int:
        """Try every entry that is due; returns how many were activated.

        While archives come it looks again for what else is due, after :meth:`look_again` at once.
        """
        if not may_ask(self._mode):
            return 0
        tasks: dict[asyncio.Task[bool], str] = {}
        tried: set[str] = set()
        activated = 0
        try:
            while True:
                self._news.clear()
                await asyncio.to_thread(self._sweep)
                for wanted, attempts in await self._due(AT_ONCE - len(tasks), tried):
                    self._coming[wanted.sha256] = wanted
                    tasks[asyncio.create_task(self._pull(wanted, attempts))] = wanted.sha256
                if not tasks:
                    return activated
                for done in await self._first_of(tasks):
                    sha256 = tasks.pop(done)
                    del self._coming[sha256]
                    tried.add(sha256)
                    activated += done.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._coming.clear()

    async def _due(self, room: int, tried: Collection[str]) -> list[tuple[Wanted, int]]:
        """What to begin now, with its attempts: the shortest first, of each model one at a time, each once in a run."""
        busy = {w.name for w in self._coming.values()}
        found: list[tuple[Wanted, int]] = []
        wanted = await asyncio.to_thread(self._wanted)
        for one in sorted(wanted, key=lambda w: w.length if w.length is not None else MEBIBYTE << 20):
            if len(found) == room:
                break
            row = await asyncio.to_thread(self.models.pull, one.sha256)
            due = is_due(row, self._mark(one), self.db.clock.ticks(), by_version=one.by_version)
            if due and one.name not in busy and one.sha256 not in tried:
                busy.add(one.name)
                found.append((one, int(row["attempts"] or 0) if row else 0))
        return found

    async def _first_of(self, tasks: Collection[asyncio.Task[bool]]) -> set[asyncio.Task[bool]]:
        """Those that ended; none of them after news or LOOK_SECONDS."""
        news = asyncio.create_task(self._news.wait())
        try:
            done, _ = await asyncio.wait({*tasks, news}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        return {task for task in tasks if task in done}

    async def _pull(self, wanted: Wanted, attempts: int) -> bool:
        place = places(self.data_dir, wanted)
        attempts += 1
        try:
            await self._download(wanted, place)
            async with self._installing:
                new = await in_daemon_thread(self._install, wanted, place)
        except transfer.WrongDigest as error:
            if wanted.signed:  # what is true is signed; the bytes may come right the next time
                why = f"{error.cause}: damaged on its way, or not what was signed; it is fetched again"
                await asyncio.to_thread(self._again, wanted, attempts, why, None)
                return False
            await asyncio.to_thread(self._rejected, wanted, place, attempts, str(error))
            return False
        except (BundleError, EngineError) as error:
            if isinstance(error, EngineError) and error.code != "GOLDEN_MISMATCH":
                await asyncio.to_thread(self._again, wanted, attempts, str(error), None)
                return False
            await asyncio.to_thread(self._rejected, wanted, place, attempts, str(error))
            return False
        except Again as error:
            await asyncio.to_thread(self._again, wanted, attempts, error.cause, error.wait)
            return False
        except NodeError as error:
            await asyncio.to_thread(self._again, wanted, attempts, str(error), None)
            return False
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, MemoryError, RuntimeError) as error:
            await asyncio.to_thread(self._again, wanted, attempts, f"{type(error).__name__} while pulling", None)
            return False
        await asyncio.to_thread(self._activated, wanted, place, attempts, new)
        return True

    async def _download(self, wanted: Wanted, place: Places) -> None:
        most = self.cloud.max_bundle_mb * MEBIBYTE
        goal = transfer.Goal(wanted.sha256, wanted.length, most)
        source = source_for(wanted.url, self.cloud, self.db.clock)
        await transfer.fetch(
            source, wanted.url, goal, place.archive, check_room=self._check_room, timeout=self.cloud.timeout_seconds
        )

    def _check_room(self) -> None:
        if durable.free_bytes(self.data_dir) <= self.reserve:
            raise StorageError(
                "pull model", "the disk is at its reserve", "Free space on the volume of data_dir", retryable=True
            )

    def _install(self, wanted: Wanted, place: Places) -> bool:
        """Unpack, verify in staging under the final names, then move into place. Blocking.

        The worker picks the newest version in data_dir/models, so nothing unverified may
        ever stand there. False when the operator has the very same in ``inference.models_dir``: it may be
        what serves by default, and to hold it back would leave nobody to serve.
        """
        durable.remove_tree(place.work)
        durable.make_directory(place.work)
        room = durable.free_bytes(self.data_dir) - self.reserve
        caps = Caps(bytes=min(4 * self.cloud.max_bundle_mb * MEBIBYTE, max(0, room)))
        try:
            unpacked = unpack(place.archive, place.work / "_unpacked", caps)
            candidate = place.work / wanted.name / wanted.version
            durable.make_directory(candidate.parent)
            durable.rename_into_place(unpacked, candidate)
            self.verify(candidate)
            if _same(candidate, self._own / wanted.name / wanted.version):
                return False
            self._hold_back(wanted)
            self._place(candidate, place.final)
            return True
        finally:
            durable.remove_tree(place.work)

    def _hold_back(self, wanted: Wanted) -> None:
        """Before the folder is there: the newest one serves where none was activated."""
        life = Life(self.db)
        if wanted.plan.at_once or life.state(wanted.name, wanted.version) is not None:
            return  # known: a former attempt was cut after this, or the operator has changed it since
        life.stage(wanted.name, wanted.version, who=SYNC, why=_pulled(wanted))

    def _place(self, candidate: Path, final: Path) -> None:
        durable.make_directory(final.parent)
        if _same(candidate, final):
            durable.sync_directory(final.parent)  # placed before a crash, maybe not durably
            return
        durable.sync_directory(candidate.parent)
        durable.rename_into_place(candidate, final)
        durable.sync_directory(final.parent)

    def _activated(self, wanted: Wanted, place: Places, attempts: int, new: bool) -> None:
        outcome: PullOutcome = "activated" if wanted.plan.at_once else "placed"
        if wanted.plan.at_once:
            self.models.activate(wanted.name, wanted.version, SYNC, _pulled(wanted))
        self._record(wanted, outcome, attempts, 0.0, None)
        transfer.drop(place.archive)
        doorbell.ring(self.data_dir, "worker")
        text = f"pulled, verified and {outcome}"
        if not new:
            text = (
                f"the same is in inference.models_dir already: {outcome if wanted.plan.at_once else 'nothing changes'}"
            )
        Events(self.db).add("info", "model", f"{wanted.name}@{wanted.version}", text)
        self._log.info(f"model {outcome}", model=wanted.name, version=wanted.version, digest=wanted.sha256[:16])
        metrics.model_pull(outcome)

    def _rejected(self, wanted: Wanted, place: Places, attempts: int, why: str) -> None:
        transfer.drop(place.archive)
        self._record(wanted, "rejected", attempts, 0.0, f"{why} [{self._mark(wanted)}]")
        Events(self.db).add("error", "model-rejected", f"{wanted.name}@{wanted.version}", why)
        self._log.error("model rejected", model=wanted.name, version=wanted.version, cause=why)
        metrics.model_pull("rejected")

    def _again(self, wanted: Wanted, attempts: int, why: str, wait: float | None) -> None:
        longest = longest_wait(self._mode, self.longest)
        pause = wait if wait is not None else backoff_seconds(attempts, BACKOFF_SECONDS, longest)
        self._record(wanted, "pending", attempts, self.db.clock.ticks() + pause, why)
        if attempts == 1:
            Events(self.db).add("warning", "model", f"{wanted.name}@{wanted.version}", f"not pulled yet: {why}")
        self._log.warning("model not pulled", model=wanted.name, version=wanted.version, cause=why, retry_in=pause)
        metrics.model_pull("retried")

    def _record(self, wanted: Wanted, state: str, attempts: int, next_at: float, error: str | None) -> None:
        self.models.record_pull(
            {
                "sha256": wanted.sha256,
                "name": wanted.name,
                "version": wanted.version,
                "state": state,
                "attempts": attempts,
                "next_at": next_at,
                "last_error": error,
                "source": "repository" if wanted.signed else "url",
                "length": wanted.length,
                "finished_time": None if state == "pending" else iso(self.db.clock.wall()),
            }
        )


def _pulled(wanted: Wanted) -> str:
    return f"pulled, SHA-256 {wanted.sha256[:16]}…"


def _same(candidate: Path, there: Path) -> bool:
    """Whether the bundle stands ``there`` already; False when nothing does, BundleError when another one does."""
    if not there.exists():
        return False
    if _digests(there) == _digests(candidate):
        return True
    raise BundleError(
        "place model",
        f"another bundle is there already as {there.parent.name} {there.name}",
        "Give the changed bundle a new version",
    )


def _digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): durable.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


async def in_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run something long off the event loop without holding up the end of the process.

    Threads of an executor are joined at exit; a golden case may run for a minute. All that
    it leaves behind when it is cut is in staging.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is None

    def run() -> None:
        result, failed = None, None
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001 handed to the one who waits
            failed = error
        try:
            loop.call_soon_threadsafe(finish, result, failed)
        except RuntimeError:
            return  # the loop has ended; nobody waits any more

    threading.Thread(target=run, name="model-verify", daemon=True).start()
    return await future
