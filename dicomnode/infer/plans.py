"""Cache of TensorRT plans and timing caches under ``<data_dir>/engines`` (GPU.md, "TensorRT API").

A plan is executable code for one build of TensorRT on one GPU: the folder is ours alone
(0700), a plan is used only under the key that it was built for, only when its SHA-256 is the
one that was written beside it, and only when no other user could have written it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dicomnode import durable, metrics
from dicomnode.errors import StorageError

SCHEMA = 1
"""Raised when what is built from the same inputs changes."""

MAX_PLAN_BYTES = 8 << 30
MAX_TRIES = 5
"""Builds begun under one key of which none came to an end; stops of the node count as well, so not fewer."""

KEPT = 64
"""Plans beyond this many are removed, the oldest first."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InputRange:
    """Shapes of one input in every optimisation profile: least, usual (tuned for), most."""

    name: str
    least: Shape
    usual: Shape
    most: Shape

    def holds(self, shape: Shape) -> bool:
        return len(shape) == len(self.most) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True)
        )


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that a plan depends on; two that differ in one of these are two plans.

    ``onnx`` is the SHA-256 of the model file (bundles hold no external weights, onnxcheck.py),
    ``recipe`` names the precision and how it is asked for.
    """

    onnx: str
    tensorrt: str
    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    driver: str
    recipe: str
    profiles: tuple[InputRange, ...]
    flags: tuple[str, ...]
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all fields: the name of the plan's files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Damaged:
    """Why a cached plan is not used."""

    cause: str


class PlanStore:
    """Plans by key; every outcome of a look-up is counted."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "engines"

    def has(self, key: PlanKey) -> bool:
        """Whether a plan of this key lies here; nothing is said of its content."""
        return self._meta(key).is_file() and self._plan(key).is_file()

    def load(self, key: PlanKey) -> bytes | None:
        """The plan of ``key``, or None when there is none that can be trusted; such a one is removed."""
        found = self._look(key)
        if isinstance(found, bytes):
            metrics.plan_cache("hit")
            return found
        metrics.plan_cache("miss" if found is None else "rejected")
        if found is not None:
            self.discard(key)
        return None

    def store(self, key: PlanKey, plan: bytes) -> None:
        """Durable: after a power cut the plan is whole with its hash, or is not taken for one."""
        self._prepare()
        durable.write_durable(self._plan(key), plan)
        meta = {"sha256": durable.sha256(plan), "size": len(plan), "key": json.loads(json.dumps(asdict(key)))}
        durable.write_durable(self._meta(key), json.dumps(meta, indent=1, sort_keys=True).encode())
        self._prune()

    def begin(self, key: PlanKey) -> int:
        """Note that a build begins: how many before it were begun and never ended, not even in failure.

        A build that the kernel ends for lack of memory may take the worker with it.
        """
        before = _parsed(_read(self._tries(key), 1 << 10)).get("begun", 0)
        before = before if isinstance(before, int) else 0
        self._prepare()
        durable.write_durable(self._tries(key), json.dumps({"begun": before + 1}).encode())
        return before

    def ended(self, key: PlanKey) -> None:
        """The build came to an end, whichever."""
        durable.remove(self._tries(key))

    def discard(self, key: PlanKey) -> None:
        """Remove what lies here under ``key``: it was refused by TensorRT or is damaged."""
        durable.remove(self._meta(key))
        durable.remove(self._plan(key))

    def timings(self, name: str) -> bytes:
        """Timing cache of one TensorRT build on one GPU; empty when there is none."""
        path = self._timings(name)
        data = None if self._strange(path) else _read(path, MAX_PLAN_BYTES)
        if data is None or len(data) < 64 or hashlib.sha256(data[64:]).hexdigest().encode() != data[:64]:
            return b""
        return data[64:]

    def store_timings(self, name: str, data: bytes) -> None:
        self._prepare()
        durable.write_durable(self._timings(name), hashlib.sha256(data).hexdigest().encode() + data)

    def _look(self, key: PlanKey) -> bytes | Damaged | None:
        if not self.has(key):
            return None
        if cause := self._strange(self.folder) or self._strange(self._plan(key)) or self._strange(self._meta(key)):
            return Damaged(cause)
        meta = _parsed(_read(self._meta(key), 1 << 20))
        plan = _read(self._plan(key), MAX_PLAN_BYTES)
        if plan is None or meta.get("key") != json.loads(json.dumps(asdict(key))):
            return Damaged("it belongs to another key")
        if meta.get("sha256") != durable.sha256(plan):
            return Damaged("its SHA-256 differs from the one beside it")
        return plan

    def _prepare(self) -> None:
        durable.make_directory(self.folder, 0o700)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)

    @staticmethod
    def _strange(path: Path) -> str:
        """Why another than this user may have written ``path``; empty when none may."""
        try:
            found = path.lstat()
        except OSError:
            return ""
        if stat.S_ISLNK(found.st_mode):
            return f"{path.name} is a symbolic link"
        if found.st_uid != os.geteuid():
            return f"{path.name} belongs to another user"
        return f"others may write {path.name}" if found.st_mode & 0o022 else ""

    def _prune(self) -> None:
        plans = sorted(self.folder.glob("*.plan"), key=lambda p: p.stat().st_mtime)
        for plan in plans[: max(0, len(plans) - KEPT)]:
            durable.remove(plan.with_suffix(".json"))
            durable.remove(plan)

    def _plan(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.plan"

    def _meta(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.json"

    def _tries(self, key: PlanKey) -> Path:
        return self.folder / f"{key.digest}.tries"

    def _timings(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.timing"


def _read(path: Path, limit: int) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError("read engine cache", error.strerror or str(error), "Check the volume of data_dir") from error
    return data if len(data) <= limit else None


def _parsed(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
