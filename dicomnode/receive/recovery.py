"""After a power cut: what the journal holds beyond the last retirement is stored again.

After a mere crash of the process everything is there already; then this only makes it durable.

Journals of several receivers are read one after the other, or at once, and rows of some of their
objects may be there: so each record says when it was received, and what was received last serves.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from dicomnode import durable, logs
from dicomnode.durable import ObjectStore
from dicomnode.errors import MalformedDataSet, StorageError
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.index.journals import Journals
from dicomnode.receive.journal import SUFFIX, Found, Journal
from dicomnode.receive.part10 import file_meta


def fields_of(
    *,
    sop_class_uid: str,
    sop_instance_uid: str,
    transfer_syntax_uid: str,
    calling_ae: str,
    association_id: str,
    received_at: float,
) -> dict[str, str]:
    """What a record has to say beside the data set."""
    return {
        "class": sop_class_uid,
        "instance": sop_instance_uid,
        "syntax": transfer_syntax_uid,
        "ae": calling_ae,
        "association": association_id,
        "at": repr(received_at),
    }


def recover(journal: Journal, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Store again what is not retired; returns how many objects. The journal is empty afterwards.

    Raises StorageError when the disk does not allow it: nothing may be accepted then.
    """
    journals = Journals(catalogue.db)
    retired = highest = journals.retired(journal.mark)
    count = 0
    for found in journal.records(after=retired):
        highest = max(highest, found.number)
        try:
            count += _store_again(found, catalogue, store, wanted)
        except (MalformedDataSet, LookupError, TypeError, ValueError) as error:
            _put_aside(found, store, type(error).__name__)
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
        finally:
            journal.close()
    return count


def _store_again(found: Found, catalogue: Catalogue, store: ObjectStore, wanted: Wanted) -> int:
    """Durable file, then durable row. Raises MalformedDataSet for what this version would refuse."""
    fields = found.fields
    meta = _meta(found)
    attributes = read_header(found.data_set, fields["syntax"], wanted)
    if (attributes.get("SOPInstanceUID"), attributes.get("SOPClassUID")) != (fields["instance"], fields["class"]):
        raise MalformedDataSet("recover", "UIDs differ between command and data set")
    if not attributes.get("StudyInstanceUID") or not attributes.get("SeriesInstanceUID"):
        raise MalformedDataSet("recover", "a UID is missing")
    data_hash = durable.hash_object(found.data_set, meta)
    received_at = float(fields.get("at", 0.0))  # 0: a record of an older version, which counts as received now
    held = catalogue.holding(fields["instance"], data_hash.whole)
    for file in held:  # the row survived: its file may not have
        path = store.stage(store.new_name(attributes["SeriesInstanceUID"]), [meta, found.data_set])
        durable.rename_into_place(path, store.path(file))
        durable.sync_directory(store.path(file).parent)
    if held and catalogue.received_at(fields["instance"]) >= received_at:
        return 1
    name = store.new_name(attributes["SeriesInstanceUID"])
    path = store.stage(name, [meta, found.data_set])
    durable.sync_directory(path.parent)
    new = NewInstance(
        attributes=attributes,
        transfer_syntax_uid=fields["syntax"],
        file=name,
        size=len(meta) + len(found.data_set),
        sha256=data_hash.whole,
        dataset_sha256=data_hash.data_set,
        association_id=fields["association"],
        received_at=received_at,
    )
    if catalogue.commit([new]) == [Stored.duplicate]:
        _mend_copy(new, path, catalogue, store)
    logs.get().info("object stored again from the journal", instance=logs.uid_hash(fields["instance"]))
    return 1


def _meta(found: Found) -> bytes:
    fields = found.fields
    return file_meta(
        sop_class_uid=fields["class"],
        sop_instance_uid=fields["instance"],
        transfer_syntax_uid=fields["syntax"],
        source_ae=fields["ae"],
    )


def _put_aside(found: Found, store: ObjectStore, cause: str) -> None:
    """It was acknowledged, by other settings or another version; one object must neither be lost nor stop a start."""
    path = store.root.parent / "strays" / f"{uuid.uuid4().hex}.dcm"
    durable.write_durable(path, _meta(found) + found.data_set)
    logs.get().error(
        "object of the journal put aside into strays", instance=logs.uid_hash(found.fields["instance"]), cause=cause
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
