"""Slices that were read while their series arrived: the same volume, in bounded memory, never a wrong one."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dicomnode.durable import ObjectStore, hash_object, sha256
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.infer import slice_header
from dicomnode.infer.ahead import KEPT_SECONDS, ReadAhead
from dicomnode.infer.decode import InlineDecoder, PoolDecoder, Undecodable, decode_frame
from dicomnode.infer.volume import read_volume
from dicomnode.part10 import begun_header, data_set_begin
from dicomnode.records import SourceInstance
from tests.infer.infer_case import CONTRACT, DATA, write_series


@dataclass
class Decoding:
    """Decodes at once, or as it is told."""

    at_once: int = 1000
    error: Exception | None = None
    submitted: int = 0

    def submit(self, part10: bytes, rows: int, columns: int) -> Future:
        self.submitted += 1
        future: Future = Future()
        if self.error:
            future.set_exception(self.error)
        else:
            future.set_result(decode_frame(part10, rows, columns))
        return future


class NoDecoder:
    def frames(self, files):
        assert not list(files), "a slice was decoded again"
        return iter(())


@dataclass
class Arriving:
    """A node's index and store into which slices of a series come."""

    folder: Path
    files: list[Path]
    db: Database
    store: ObjectStore
    now: float = 0.0
    decoding: Decoding = field(default_factory=Decoding)

    def receive(self, start: int, stop: int) -> None:
        for path in self.files[start:stop]:
            data = path.read_bytes()
            syntax, begin = data_set_begin(data)
            attributes = read_header(data[begin:], syntax, Wanted(HEADER_KEYS))
            name = self.store.new_name(attributes["SeriesInstanceUID"])
            self.store.stage(name, [data])
            hashes = hash_object(data[begin:], data[:begin])
            new = NewInstance(attributes, syntax, name, len(data), hashes.whole, hashes.data_set)
            Catalogue(self.db).commit([new])

    def ahead(self, *, wanted=lambda attributes: attributes["Modality"] == "CT", max_bytes=1 << 30) -> ReadAhead:
        return ReadAhead(self.db, self.store, self.decoding, wanted, max_bytes=max_bytes, monotonic=lambda: self.now)

    def sources(self) -> list[SourceInstance]:
        return [
            SourceInstance(
                r["SOPInstanceUID"], r["SOPClassUID"], r["TransferSyntaxUID"], self.store.path(r["file"]), r["sha256"]
            )
            for r in self.db.rows("SELECT * FROM instances ORDER BY id")
        ]


@pytest.fixture
def arriving(tmp_path: Path):
    hu = np.random.default_rng(3).integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
    db = Database(tmp_path / "data")
    store = ObjectStore(tmp_path / "data")
    store.prepare()
    yield Arriving(tmp_path, write_series(tmp_path / "series", hu), db, store)
    db.close()


def test_the_volume_is_the_same_and_nothing_is_decoded_twice(arriving: Arriving) -> None:
    ahead = arriving.ahead()
    for start in (0, 2, 4):  # as the rows come
        arriving.receive(start, start + 2)
        ahead.look()
    sources = arriving.sources()
    taken = ahead.take(sources)
    assert len(taken) == 6 and ahead.kept_bytes == 0
    early = read_volume(sources, CONTRACT, decoder=NoDecoder(), ahead=taken)
    late = read_volume(sources, CONTRACT)
    assert np.array_equal(early.values, late.values) and early.values.dtype == late.values.dtype
    assert early.source_uids == late.source_uids and np.array_equal(early.affine, late.affine)


def test_what_came_last_is_read_by_the_job(arriving: Arriving) -> None:
    ahead = arriving.ahead()
    arriving.receive(0, 4)
    ahead.look()
    arriving.receive(4, 6)
    sources = arriving.sources()
    taken = ahead.take(sources)
    assert len(taken) == 4
    ahead.look()  # the job has them: they are not read once more
    assert arriving.decoding.submitted == 4 and ahead.kept_bytes == 0
    mixed = read_volume(sources, CONTRACT, ahead=taken)
    assert np.array_equal(mixed.values, read_volume(sources, CONTRACT).values)
    ahead.done(sources)


def test_the_volume_lies_in_memory_that_was_made_ready(arriving: Arriving) -> None:
    """And what comes for the next revision leaves it alone."""
    arriving.receive(0, 4)
    ahead = arriving.ahead()
    ahead.look()
    sources = arriving.sources()
    taken = ahead.take(sources)
    (room,) = {id(one.room): one.room for one in taken.values()}.values()
    assert room is not None
    volume = read_volume(sources, CONTRACT, decoder=NoDecoder(), ahead=taken)
    before = volume.values.copy()
    assert not volume.values.flags.owndata and np.array_equal(before, read_volume(sources, CONTRACT).values)
    ahead.done(sources)
    arriving.receive(4, 6)
    ahead.look()
    late = ahead.take(arriving.sources())
    assert late and all(one.room is not room for one in late.values())
    room.grow(1000)
    assert np.array_equal(volume.values, before)


def test_a_file_that_is_not_what_was_acknowledged_is_left_to_the_job(arriving: Arriving) -> None:
    arriving.receive(0, 6)
    damaged = arriving.sources()[2]
    data = bytearray(damaged.path.read_bytes())
    data[-5] ^= 1
    damaged.path.write_bytes(data)
    ahead = arriving.ahead()
    ahead.look()
    assert damaged.sop_instance_uid not in ahead.take(arriving.sources())


def test_an_image_that_was_replaced_since_is_not_used(arriving: Arriving) -> None:
    arriving.receive(0, 6)
    ahead = arriving.ahead()
    ahead.look()
    sources = arriving.sources()
    other = SourceInstance(
        *(getattr(sources[0], n) for n in ("sop_instance_uid", "sop_class_uid", "transfer_syntax_uid", "path")),
        sha256(b"other"),
    )
    taken = ahead.take([other, *sources[1:]])
    assert set(taken) == {s.sop_instance_uid for s in sources[1:]}


def test_a_series_that_no_rule_wants_is_not_opened(arriving: Arriving) -> None:
    arriving.receive(0, 6)
    for source in arriving.sources():
        source.path.unlink()
    asked: list[str] = []
    ahead = arriving.ahead(wanted=lambda attributes: asked.append(attributes["SeriesInstanceUID"]) or False)
    ahead.look()
    ahead.look()
    assert asked == ["1.2.3.4"] and arriving.decoding.submitted == 0


def test_memory_is_bounded_and_goes_on_when_there_is_room(arriving: Arriving) -> None:
    size = 2 * 8 * 10 * 2  # the pixels of a slice, and their place in the volume
    arriving.receive(0, 6)
    ahead = arriving.ahead(max_bytes=3 * size)
    ahead.look()
    ahead.look()
    assert arriving.decoding.submitted == 3 and ahead.kept_bytes == 3 * size
    first = arriving.sources()[:3]
    assert len(ahead.take(first)) == 3
    ahead.look()
    assert arriving.decoding.submitted == 6 and ahead.kept_bytes == 3 * size


@pytest.mark.parametrize(
    "error", [Undecodable("DECODE_FAILED", "no"), BrokenProcessPool("crash"), RuntimeError("closed")]
)
def test_a_decoder_that_failed_leaves_the_slice_to_the_job(arriving: Arriving, error: Exception) -> None:
    arriving.decoding.error = error
    arriving.receive(0, 6)
    ahead = arriving.ahead()
    ahead.look()
    sources = arriving.sources()
    found = read_volume(sources, CONTRACT, decoder=InlineDecoder(), ahead=ahead.take(sources))
    assert np.array_equal(found.values, read_volume(sources, CONTRACT).values)


def test_what_nobody_asks_for_is_let_go(arriving: Arriving) -> None:
    arriving.receive(0, 6)
    ahead = arriving.ahead()
    ahead.look()
    arriving.now = KEPT_SECONDS
    ahead.look()
    assert ahead.kept_bytes > 0
    for _ in range(2):
        arriving.now += KEPT_SECONDS + 1
        ahead.look()
        assert ahead.kept_bytes == 0 and arriving.decoding.submitted == 6
        arriving.db.execute("UPDATE series SET selected_generation = generation")
    assert not ahead._series and not ahead.take(arriving.sources())


def test_two_threads_share_a_pool_that_broke(tmp_path: Path) -> None:
    """A crash by one series' file must not take the pool that the other has started anew."""
    paths = write_series(tmp_path, np.zeros((3, 4, 4), np.int16))
    with PoolDecoder(1) as pool:
        broken = pool._executor()
        broken._broken = "as after a crash"
        assert pool.submit(paths[0].read_bytes(), 4, 4).result(30).shape == (4, 4)
        fresh = pool._executor()
        pool._leave(broken)
        assert pool._executor() is fresh


@pytest.mark.parametrize("folder", ["charsets", "malformed", "transfer-syntaxes", "cr-chest"])
def test_headers_read_fast_are_those_that_pydicom_reads(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is not here")
    fast = 0
    for path in sorted((DATA / folder).rglob("*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        fast += begun_header(data, slice_header._WANTED) is not None
        found = []
        for reader in (begun_header, lambda head, wanted: None):
            monkeypatch.setattr(slice_header, "begun_header", reader)
            try:
                found.append(slice_header.read_header(data))
            except Exception as error:  # noqa: BLE001 the same error counts as the same
                found.append((type(error), str(error)))
        assert found[0] == found[1], path.name
    assert fast
