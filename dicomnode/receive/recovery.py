"""After a power cut: what the journal holds beyond the last retirement is stored again.

After a mere crash of the process everything is there already; then this only makes it durable.

Journals of several receivers are read one after the other, or at once, and rows of some of their
objects may be there: so each record says when it was received, and what was received last serves.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dicomnode import durable, logs
from dicomnode.durable import ObjectStore
from dicomnode.errors import MalformedDataSet, StorageError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.index.journals import Journals
from dicomnode.receive import progress
from dicomnode.receive.journal import SUFFIX, Found, Journal
from dicomnode.receive.record import IDENTITY, Fields, decode_fields, describe, meta_of
from dicomnode.receive.retire import SYNC_THREADS

BATCH = 256
"""Records whose barriers come together."""


def recover(journal: Journal, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Store again what is not retired; returns how many objects. The journal is empty afterwards.

    Raises StorageError when the disk does not allow it: nothing may be accepted then.
    """
    journals = Journals(catalogue.db)
    highest = journals.retired(journal.mark)
    count = 0
    with ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync") as pool:
        for batch in batched(journal.records(after=highest)):
            files = [_recovered(found, catalogue, store, wanted) for found in batch]
            store.sync(itertools.chain.from_iterable(files), pool)
            highest = batch[-1].number
            journals.retire(journal.mark, highest)
            count += sum(map(bool, files))
    journal.begin_after(highest)
    return count


def batched(records: Iterator[Found]) -> Iterator[list[Found]]:
    while batch := list(itertools.islice(records, BATCH)):
        yield batch


def _recovered(found: Found, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> list[str]:
    """The files (relative names) that have to be durable; none when the record was put aside."""
    fields = decode_fields(found.fields)
    try:
        return _store_again(fields, found.data_set, catalogue, store, wanted)
    except (MalformedDataSet, LookupError, TypeError, ValueError) as error:
        _put_aside(fields, found.data_set, store, type(error).__name__)
        return []


def recover_others(folder: Path, own: Path, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Journals of receivers that do not run any more, as after a change of ``dimse.workers``."""
    count = 0
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if path == own:
            continue
        try:
            journal = Journal(path, path.stat().st_size)
        except (StorageError, OSError):
            continue  # its receiver runs
        try:
            count += recover(journal, catalogue, store, wanted)
            durable.remove(path.with_suffix(progress.SUFFIX))
        finally:
            journal.close()
    return count


def _store_again(
    fields: Fields, data_set: bytes, catalogue: Catalogue, store: ObjectStore, wanted: Wanted
) -> list[str]:
    """File and row, without barriers; the names of the files that have to be durable.

    Raises MalformedDataSet for what this version would refuse.
    """
    described = describe(fields, data_set, wanted)
    attributes = described.attributes
    stated = fields.sop_instance_uid, fields.sop_class_uid
    if (attributes.get("SOPInstanceUID"), attributes.get("SOPClassUID")) != stated:
        raise MalformedDataSet("recover", "UIDs differ between command and data set")
    if not all(attributes.get(keyword) for keyword in IDENTITY):
        raise MalformedDataSet("recover", "a UID is missing")
    uid = fields.sop_instance_uid
    held = catalogue.holding(uid, described.hashes.whole)
    for file in held:  # the row survived: its file may not have
        path = store.stage(store.new_name(attributes["SeriesInstanceUID"]), [described.meta, data_set], sync=False)
        durable.rename_into_place(path, store.path(file))
    if held and catalogue.received_at(uid) >= fields.received_at:
        return held
    new = described.instance(fields, store.new_name(attributes["SeriesInstanceUID"]))
    path = store.stage(new.file, [described.meta, data_set], sync=False)
    outcome = catalogue.commit([new], sync=False)
    logs.get().info("object stored again from the journal", instance=logs.uid_hash(uid))
    serving = _mended_copy(new, path, catalogue, store) if outcome == [Stored.duplicate] else new.file
    return [*held, serving]


def _put_aside(fields: Fields, data_set: bytes, store: ObjectStore, cause: str) -> None:
    """It was acknowledged, by other settings or another version; one object must neither be lost nor stop a start."""
    path = store.root.parent / "strays" / f"{uuid.uuid4().hex}.dcm"
    durable.write_durable(path, meta_of(fields) + data_set)
    logs.get().error(
        "object of the journal put aside into strays", instance=logs.uid_hash(fields.sop_instance_uid), cause=cause
    )


def _mended_copy(new: NewInstance, path: Path, catalogue: Catalogue, store: ObjectStore) -> str:
    """Another sender's copy of the same data set has the row; it may never have become durable."""
    uid = new.attributes["SOPInstanceUID"]
    name = catalogue.file_of(uid)
    try:
        intact = durable.object_intact(store.path(name), catalogue.hash_of(uid))
    except OSError:
        intact = False
    if intact:
        durable.remove(path)
        return name
    catalogue.mend_file(uid, file=new.file, size=new.size, sha256=new.sha256)
    return new.file
