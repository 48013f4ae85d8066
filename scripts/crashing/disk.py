"""A file system that may forget: which files a power cut can leave behind.

Fed with the events of a trace, :class:`Disk` knows at each moment what is certain and what is
only likely. The rules are what POSIX promises and no more:

* The contents of a file are certain up to its last fsync or fdatasync. Of what was written since,
  each sector may hold any of its versions, independently, and the size may be any in between.
* A name is certain once the directory that holds it was synced; syncing the file does not help.
  What happened to the names of one directory since is kept up to some point, in order; a rename
  between two directories happens in both or in none.

Nothing here looks at what the files mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.crashing.shim import Event

SECTOR = 512
"""The least that a disk writes whole (T10 SBC, logical block); SQLite relies on no more."""

FORGOTTEN = ("-shm", ".progress")
"""Endings of SQLite's WAL index and of what receivers tell each other: shared memory that is built anew after each
crash, never read from the disk."""


MADE_BY_READERS = "-wal"
"""Ending of SQLite's log: whoever looks into the index may be the one who makes it, a test as well."""


class NotModelled(RuntimeError):
    """The trace holds a call whose effect after a power cut is not described here."""


@dataclass(slots=True, eq=False, repr=False)
class File:
    """``certain`` bytes, and what was done since: (offset, bytes) for a write, (-1 - size, b"") for a new size."""

    certain: bytes = b""
    latest: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.pending.append((offset, data))
        _write(self.latest, offset, data)

    def resize(self, size: int) -> None:
        self.pending.append((-1 - size, b""))
        _resize(self.latest, size)

    def sync(self) -> None:
        if self.pending:
            self.certain = bytes(self.latest)
            self.pending.clear()


@dataclass(slots=True, eq=False, repr=False)
class Directory:
    entries: dict[str, File | Directory] = field(default_factory=dict)


Node = File | Directory


@dataclass(slots=True, eq=False, repr=False)
class NameChange:
    """One step in the name space: (directory, name, what it names then; None for nothing)."""

    entries: list[tuple[Directory, str, Node | None]]

    def directories(self) -> set[int]:
        return {id(directory) for directory, _, _ in self.entries}


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if len(content) > size:
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _apply(content: bytearray, change: tuple[int, bytes]) -> None:
    if change[0] < 0:
        _resize(content, -1 - change[0])
    else:
        _write(content, *change)


# What becomes of a file's contents.


def nothing_since(file: File) -> bytes:
    return file.certain


def everything(file: File) -> bytes:
    return bytes(file.latest) if file.pending else file.certain


def size_alone(file: File) -> bytes:
    """The metadata came through, the data did not: a longer file holds zeros."""
    return file.certain + bytes(max(0, len(file.latest) - len(file.certain)))


def torn(chance: random.Random) -> Callable[[File], bytes]:
    """All but the last change, and of that one a part."""

    def contents(file: File) -> bytes:
        if not file.pending:
            return file.certain
        found = bytearray(file.certain)
        for change in file.pending[:-1]:
            _apply(found, change)
        offset, data = file.pending[-1]
        if offset >= 0:
            _write(found, offset, data[: chance.randrange(len(data) + 1)])
        return bytes(found)

    return contents


def shuffled(chance: random.Random, sector: int = SECTOR) -> Callable[[File], bytes]:
    """Each sector in any of its versions, the size any in between."""

    def contents(file: File) -> bytes:
        if not file.pending:
            return file.certain
        version, sizes = bytearray(file.certain), [len(file.certain)]
        versions: dict[int, list[bytes]] = {}
        for change in file.pending:
            before = len(version)
            _apply(version, change)
            sizes.append(len(version))
            touched = (
                range(change[0] // sector, -(-(change[0] + len(change[1])) // sector))
                if change[0] >= 0
                else range(min(before, len(version)) // sector, -(-max(before, len(version)) // sector))
            )
            for number in touched:
                versions.setdefault(number, []).append(bytes(version[number * sector : (number + 1) * sector]))
        size = chance.choice(sizes)
        found = bytearray(file.certain)
        _resize(found, max(sizes))
        for number, later in versions.items():
            chosen = chance.choice([bytes(found[number * sector : (number + 1) * sector]), *later])
            _write(found, number * sector, chosen.ljust(min(sector, max(sizes) - number * sector), b"\0"))
        _resize(found, size)
        return bytes(found)

    return contents


# What becomes of names.


def all_names(_: Directory) -> float:
    return 1.0


def no_names(_: Directory) -> float:
    return 0.0


def all_but(count: int) -> Callable[[Directory], float]:
    """The newest ``count`` steps of each directory are lost."""
    return lambda _: -float(count)


def some_names(chance: random.Random) -> Callable[[Directory], float]:
    """How far each directory got, as a share of what is pending."""
    return lambda _: chance.random()


class Disk:
    """The watched folder; feed it with :meth:`apply` and ask for what :meth:`crash` may leave."""

    def __init__(self) -> None:
        self._root = Directory()
        self._now: dict[str, Node] = {"": self._root}
        self._nodes: dict[int, Node] = {}
        self._names: list[NameChange] = []

    def place(self, path: str, ino: int, content: bytes | None) -> None:
        """Something that is there, and certain, from the beginning; None for a folder."""
        node: Node = Directory() if content is None else File(content, bytearray(content))
        self._nodes[ino] = self._now[path] = node
        _set(*self._place(path), node)

    def apply(self, event: Event) -> bool:
        """Take in one event; whether it changed anything that a crash could show."""
        if event.kind in "NGKF" or event.path.endswith(FORGOTTEN):
            return False
        if event.kind == "S":
            return self._sync(event)
        if event.kind in "!P":
            raise NotModelled(f"{event.kind} {event.path} {event.other}")
        {
            "O": self._create,
            "M": self._create,
            "L": self._link,
            "W": self._data,
            "T": self._data,
            "R": self._rename,
            "U": self._remove,
            "X": self._remove,
        }[event.kind](event)
        return True

    def uncertain(self) -> bool:
        return bool(self._names) or any(isinstance(n, File) and n.pending for n in self._nodes.values())

    def crash(
        self, contents: Callable[[File], bytes], names: Callable[[Directory], float] = all_names
    ) -> dict[str, bytes]:
        """The files after a power cut, by path.

        ``names`` tells how much of what is pending in a directory is kept: a share, or less than
        nothing for all but that many steps.
        """
        overlay = self._kept(names)
        return dict(_walk(self._root, "", overlay, contents))

    def _kept(self, names: Callable[[Directory], float]) -> dict[int, dict[str, Node | None]]:
        waiting: dict[int, int] = {}
        for change in self._names:
            for number in change.directories():
                waiting[number] = waiting.get(number, 0) + 1
        left: dict[int, int] = {}
        overlay: dict[int, dict[str, Node | None]] = {}
        stopped: set[int] = set()
        for change in self._names:
            for directory, _, _ in change.entries:
                if id(directory) not in left:
                    share, most = names(directory), waiting[id(directory)]
                    left[id(directory)] = most + int(share) if share < 0.0 else round(share * most)
            here = change.directories()
            if here & stopped or any(left[number] <= 0 for number in here):
                stopped |= here
                continue
            for number in here:
                left[number] -= 1
            for directory, name, node in change.entries:
                overlay.setdefault(id(directory), {})[name] = node
        return overlay

    def _sync(self, event: Event) -> bool:
        node = self._now.get(event.path)
        if event.ino in self._nodes:  # the file may have been renamed since it was opened
            node = self._nodes[event.ino]
        if isinstance(node, File):
            had = bool(node.pending)
            node.sync()
            return had
        if not isinstance(node, Directory):
            return False
        before = len(self._names)
        wanted = {id(node)}
        chosen: set[int] = set()
        for change in reversed(self._names):  # what a kept step builds on is kept too
            if change.directories() & wanted:
                wanted |= change.directories()
                chosen.add(id(change))
        for change in self._names:
            if id(change) in chosen:
                for directory, name, target in change.entries:
                    _set(directory, name, target)
        self._names = [c for c in self._names if id(c) not in chosen]
        return len(self._names) != before

    def _create(self, event: Event) -> None:
        node: Node = Directory() if event.kind == "M" else File()
        self._nodes[event.ino] = node
        self._name(event.path, node)

    def _link(self, event: Event) -> None:
        self._name(event.path, self._nodes[event.ino])

    def _data(self, event: Event) -> None:
        if event.ino not in self._nodes and event.path.endswith(MADE_BY_READERS):
            self._create(event)
        node = self._nodes[event.ino]
        assert isinstance(node, File)
        if event.kind == "W":
            node.write(event.offset, event.data)
        else:
            node.resize(event.length)

    def _rename(self, event: Event) -> None:
        node = self._now[event.path]
        if event.path == event.other:
            return
        (source, old), (target, new) = self._place(event.path), self._place(event.other)
        self._names.append(NameChange([(source, old, None), (target, new, node)]))
        moved = [p for p in self._now if p == event.path or p.startswith(f"{event.path}/")]
        for path in moved:
            self._now[event.other + path[len(event.path) :]] = self._now.pop(path)

    def _remove(self, event: Event) -> None:
        directory, name = self._place(event.path)
        self._names.append(NameChange([(directory, name, None)]))
        self._now.pop(event.path, None)

    def _name(self, path: str, node: Node) -> None:
        if not path:  # the root itself is taken as certain; its parent is not watched
            self._root = node if isinstance(node, Directory) else self._root
            self._now[""] = self._root
            return
        directory, name = self._place(path)
        self._names.append(NameChange([(directory, name, node)]))
        self._now[path] = node

    def _place(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rpartition("/")
        directory = self._now[parent]
        assert isinstance(directory, Directory)
        return directory, name


class Snapshot:
    """A folder as it is now, on a disk on which all of it is certain; calling it makes that disk."""

    def __init__(self, folder: Path) -> None:
        self._entries = [
            (p.relative_to(folder).as_posix(), p.stat().st_ino, None if p.is_dir() else p.read_bytes())
            for p in sorted(folder.rglob("*"))
            if p.is_dir() or p.is_file()
        ]

    def __call__(self) -> Disk:
        disk = Disk()
        for path, ino, content in self._entries:
            disk.place(path, ino, content)
        return disk


def _set(directory: Directory, name: str, node: Node | None) -> None:
    if node is None:
        directory.entries.pop(name, None)
    else:
        directory.entries[name] = node


def _walk(
    directory: Directory, prefix: str, overlay: dict[int, dict[str, Node | None]], contents: Callable[[File], bytes]
) -> Iterator[tuple[str, bytes]]:
    entries: dict[str, Node | None] = dict(directory.entries)
    entries.update(overlay.get(id(directory), {}))
    for name, node in entries.items():
        if isinstance(node, File):
            yield prefix + name, contents(node)
        elif node is not None and (node.entries or id(node) in overlay):
            yield from _walk(node, f"{prefix}{name}/", overlay, contents)


def states(disk: Disk, chance: random.Random, rounds: int) -> Iterable[tuple[str, dict[str, bytes]]]:
    """Crash states with a name each: the extremes, then ``rounds`` of random ones."""
    yield "nothing since the last sync", disk.crash(nothing_since, no_names)
    yield "everything", disk.crash(everything)
    yield "names without data", disk.crash(nothing_since)
    yield "names and sizes without data", disk.crash(size_alone)
    yield "data without names", disk.crash(everything, no_names)
    yield "data without the last name", disk.crash(everything, all_but(1))
    yield "data without the last two names", disk.crash(everything, all_but(2))
    for _ in range(rounds):
        yield "the last write torn", disk.crash(torn(chance), some_names(chance))
        yield "sectors of any age", disk.crash(shuffled(chance), some_names(chance))
        yield "pages of any age", disk.crash(shuffled(chance, 4096))
