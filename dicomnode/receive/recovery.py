"""After a power cut: what the journal holds beyond the last retirement is stored again.

After a mere crash of the process everything is there already; then this only makes it durable.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from dicomnode import durable, logs
from dicomnode.durable import ObjectStore
from dicomnode.errors import MalformedDataSet, StorageError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.index.journals import Journals
from dicomnode.receive import progress
from dicomnode.receive.journal import SUFFIX, Journal
from dicomnode.receive.record import IDENTITY, Described, Fields, decode_fields, describe, meta_of


def recover(journal: Journal, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Store again what is not retired; returns how many objects. The journal is empty afterwards.

    Raises StorageError when the disk does not allow it: nothing may be accepted then.
    """
    journals = Journals(catalogue.db)
    retired = highest = journals.retired(journal.mark)
    count = 0
    for found in journal.records(after=retired):
        highest = max(highest, found.number)
        fields = decode_fields(found.fields)
        try:
            count += _store_again(fields, found.data_set, catalogue, store, wanted)
        except (MalformedDataSet, LookupError, TypeError, ValueError) as error:
            _put_aside(fields, found.data_set, store, type(error).__name__)
    if highest > retired:
        journals.retire(journal.mark, highest)
    journal.begin_after(highest)
    return count


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


def _store_again(fields: Fields, data_set: bytes, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Durable file, then durable row. Raises MalformedDataSet for what this version would refuse."""
    described = describe(fields, data_set, wanted)
    attributes = described.attributes
    stated = fields.sop_instance_uid, fields.sop_class_uid
    if (attributes.get("SOPInstanceUID"), attributes.get("SOPClassUID")) != stated:
        raise MalformedDataSet("recover", "UIDs differ between command and data set")
    if not all(attributes.get(keyword) for keyword in IDENTITY):
        raise MalformedDataSet("recover", "a UID is missing")
    held = _held(fields, described, catalogue)
    new = described.instance(fields, store.new_name(attributes["SeriesInstanceUID"]))
    path = store.stage(new.file, [described.meta, data_set])
    if held:  # the row survived: its file may not have
        durable.rename_into_place(path, store.path(held))
        durable.sync_directory(store.path(held).parent)
        return 1
    durable.sync_directory(path.parent)
    if catalogue.commit([new]) == [Stored.duplicate]:
        _mend_copy(new, path, catalogue, store)
    logs.get().info("object stored again from the journal", instance=logs.uid_hash(fields.sop_instance_uid))
    return 1


def _held(fields: Fields, described: Described, catalogue: Catalogue) -> str:
    """The file of the row that this very record has, if it has one.

    The same bytes may have come before: A, then B, then A again. So a former instance counts only
    where what serves now came later than this record.
    """
    uid, whole = fields.sop_instance_uid, described.hashes.whole
    serving = catalogue.instance(uid)
    if serving is None:
        return ""
    if serving["sha256"] == whole:
        return str(serving["file"])
    return catalogue.holds(uid, whole) if float(serving["received_at"]) > fields.received_at else ""


def _put_aside(fields: Fields, data_set: bytes, store: ObjectStore, cause: str) -> None:
    """It was acknowledged, by other settings or another version; one object must neither be lost nor stop a start."""
    path = store.root.parent / "strays" / f"{uuid.uuid4().hex}.dcm"
    durable.write_durable(path, meta_of(fields) + data_set)
    logs.get().error(
        "object of the journal put aside into strays", instance=logs.uid_hash(fields.sop_instance_uid), cause=cause
    )


def _mend_copy(new: NewInstance, path: Path, catalogue: Catalogue, store: ObjectStore) -> None:
    """Another sender's copy of the same data set has the row; it may never have become durable."""
    uid = new.attributes["SOPInstanceUID"]
    serving = store.path(catalogue.file_of(uid))
    try:
        intact = durable.object_intact(serving, catalogue.hash_of(uid))
    except OSError:
        intact = False
    if intact:
        durable.sync_file(serving)
        durable.sync_directory(serving.parent)
        durable.remove(path)
    else:
        catalogue.mend_file(uid, file=new.file, size=new.size, sha256=new.sha256)
