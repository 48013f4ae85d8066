"""SOP classes that are stored: those of PS3.4 B.5, and the retired ones that old devices still send."""

from __future__ import annotations

from pydicom._uid_dict import UID_dictionary
from pynetdicom import AllStoragePresentationContexts, register_uid
from pynetdicom.service_class import StorageServiceClass

_ROOT = "1.2.840.10008.5.1.4.1.1."


def _retired() -> frozenset[str]:
    """Ultrasound and nuclear medicine before 1993, trial SR and the like; pynetdicom leaves them out."""
    return frozenset(
        uid
        for uid, (name, kind, _, retired, _) in UID_dictionary.items()
        if uid.startswith(_ROOT) and kind == "SOP Class" and retired and "Storage" in name
    )


for _uid in _retired():  # else pynetdicom aborts the association at the first object
    register_uid(_uid, f"Retired_{_uid.replace('.', '_')}", StorageServiceClass)

STORAGE_CLASSES = frozenset(str(cx.abstract_syntax) for cx in AllStoragePresentationContexts) | _retired()
