"""What the node's own code says of its services: asked of negotiation, matching and TLS, not described.

Every table here is made by calling what an association calls.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.uid import UID
from pynetdicom import sop_class
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    InstanceAvailabilityNotification,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from dicomnode import commitment
from dicomnode.app import dimse_services
from dicomnode.index.columns import CONTEXT_KEYS, LEVELS, UNIQUE_KEYS, ZONE_KEY, Level, Root, columns
from dicomnode.index.database import Database
from dicomnode.index.keys import REQUIRED_KEYS
from dicomnode.index.values import matches, vr_of
from dicomnode.receive.classes import STORAGE_CLASSES
from dicomnode.receive.negotiation import Services, accepted_contexts
from dicomnode.settings import Peer, Service, Settings, Tls
from dicomnode.tls_context import build_contexts

EVERY_SERVICE: tuple[Service, ...] = get_args(Service)


@dataclass(frozen=True, slots=True)
class SopClass:
    """``scp``: this node provides the service to peers that call it; ``scu``: it uses a peer's, when it calls.

    ``reversed_scu``: it uses the caller's service on an association that the caller opened, by
    role selection (PS3.7 D.3.3.4). ``syntaxes`` are those of associations that peers open.
    """

    uid: str
    scp: bool
    scu: bool
    reversed_scu: bool
    syntaxes: tuple[str, ...]

    @property
    def name(self) -> str:
        return name_of(self.uid)


_NEWER = {str(uid): keyword for keyword, uid in vars(sop_class).items() if isinstance(uid, UID)}
"""Keywords of SOP classes; pynetdicom knows some that are newer than pydicom's dictionary."""


def name_of(uid: str) -> str:
    """PS3.6 table A-1; a keyword as words where only that is known."""
    if uid not in UID_dictionary:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", _NEWER.get(uid, uid))
    name, _, _, retired, _ = UID_dictionary[uid]
    return f"{name} (Retired)" if retired else str(name)


def names_of(uids: Iterable[str]) -> dict[str, str]:
    """UID -> name, in the order of names."""
    return dict(sorted(((uid, name_of(uid)) for uid in uids), key=lambda pair: (pair[1], pair[0])))


INITIATED: frozenset[str] = STORAGE_CLASSES | {
    str(Verification),
    commitment.SOP_CLASS,
    str(InstanceAvailabilityNotification),
    str(StudyRootQueryRetrieveInformationModelFind),
    str(StudyRootQueryRetrieveInformationModelMove),
}
"""SOP classes of which this node is the SCU on associations that it opens; a test reads the imports of deliver/."""


@contextmanager
def services_of(settings: Settings) -> Iterator[tuple[Services, ...]]:
    """The acceptor's own services, as the composition root makes them, over an index that is empty."""
    with tempfile.TemporaryDirectory(prefix="dicomnode-conformance-") as folder:
        node = settings.node.model_copy(update={"data_dir": Path(folder)})
        db = Database(Path(folder))
        services = tuple(dimse_services(settings.model_copy(update={"node": node}), db))
        try:
            yield services
        finally:
            for service in services:
                service.close()
            db.close()


def full_peer() -> Peer:
    """A peer that may do everything, and is asked for storage commitment."""
    return Peer(name="any", ae_title="ANY", allow=EVERY_SERVICE, commitment=True)


def sop_classes(services: Iterable[Services]) -> tuple[SopClass, ...]:
    """All that negotiation accepts of a peer that may do everything, and what this node proposes itself."""
    by_class = {uid: service for service in services for uid in service.classes}
    known = {uid for uid, (_, kind, *_) in UID_dictionary.items() if kind in ("SOP Class", "Meta SOP Class")}
    transfer = {uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax"}
    offered = sorted(transfer | set(ALL_TRANSFER_SYNTAXES))
    found = []
    for uid in names_of(known | STORAGE_CLASSES | INITIATED | set(by_class)):
        proposal = SimpleNamespace(abstract_syntax=uid, transfer_syntax=offered)
        accepted = accepted_contexts([proposal], full_peer(), by_class, {uid: (True, True)})
        syntaxes = tuple(str(t) for context in accepted for t in context.transfer_syntax)
        scp = any(context.scu_role for context in accepted)
        reverse = any(context.scp_role for context in accepted)
        if accepted or uid in INITIATED:
            found.append(SopClass(uid, scp, uid in INITIATED, reverse, syntaxes))
    return tuple(found)


_FIELDS = {
    "find": (
        "Relational queries",
        "Combined date-time matching",
        "Fuzzy semantic matching of person names",
        "Timezone query adjustment",
        "Enhanced multi-frame image conversion",
    ),
    "retrieve": ("Relational retrieval", "Enhanced multi-frame image conversion"),
}
"""Bytes of the application information, PS3.4 tables C.5-1 and C.5-3."""


def extended_negotiation(services: Iterable[Services]) -> list[tuple[str, str, str]]:
    """SOP class, field and whether it is supported: each class is asked for all fields."""
    rows = []
    for service in services:
        for uid, name in names_of(service.classes).items():
            fields = _FIELDS["find" if "FIND" in name else "retrieve"]
            answer = service.negotiate(SimpleNamespace(), {uid: b"\x01" * len(fields)}).get(uid)
            if answer is not None:
                rows += [(name, field, "Yes" if byte else "No") for field, byte in zip(fields, answer, strict=True)]
    return rows


def query_keys(level: Level) -> list[tuple[str, str, str, str, str]]:
    """Tag, attribute, VR, type of key (U, R, O; PS3.4 C.2.2.1) and kinds of matching; own keys of the level first."""
    depth = LEVELS[Root.PATIENT].index(level)
    above = columns(LEVELS[Root.PATIENT][depth - 1]) if depth else {}
    own = [keyword for keyword in columns(level) if keyword not in above]
    return [_key(level, keyword) for keyword in sorted(own, key=lambda k: tag_for_keyword(k) or 0)]


def _key(level: Level, keyword: str) -> tuple[str, str, str, str, str]:
    tag = tag_for_keyword(keyword) or 0
    kind = "U" if keyword == UNIQUE_KEYS[level] else "R" if keyword in REQUIRED_KEYS else "O"
    shown = f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
    return shown, dictionary_description(tag), vr_of(keyword), kind, kinds_of_matching(keyword)


_PROBES: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "list of UID": {"UI": ("1.2\\1.3", "1.3")},
    "wildcard": {vr: ("A*", "AB") for vr in ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT")},
    "range": {"DA": ("20240101-20240131", "20240115"), "TM": ("1000-1200", "110000"), "DT": ("2023-2025", "2024")},
}
"""Kind of matching -> VR -> a key and a value that match only by it."""


def kinds_of_matching(keyword: str) -> str:
    """PS3.4 C.2.2.2, by trying them."""
    vr = vr_of(keyword)
    if keyword == ZONE_KEY:
        return "none; the zone of the query where timezone adjustment is negotiated"
    if vr == "SQ":
        return "sequence, universal"
    found = ["single value"]
    found += [kind for kind, by_vr in _PROBES.items() if vr in by_vr and matches(vr, *by_vr[vr])]
    return ", ".join([*found, "universal"])


def context_keys() -> tuple[str, ...]:
    return tuple(sorted(CONTEXT_KEYS))


def cipher_suites(tls: Tls) -> list[tuple[str, str]]:
    """TLS version and suite, as the context that every connection uses has them (PS3.15 B.12)."""
    context = build_contexts(Tls(minimum_version=tls.minimum_version)).client
    oldest = "TLSv" + tls.minimum_version
    suites = ((str(c["protocol"]), str(c["name"])) for c in context.get_ciphers())
    return [(version, name) for version, name in suites if version >= oldest]


def settings_rows(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """Key, default, value at this site and description. Addresses and paths of the site are kept back."""
    for section in Settings.model_fields:
        value: Any = getattr(settings, section)
        fields = getattr(type(value), "model_fields", None)
        if fields is None:
            continue  # lists of tables: counted elsewhere
        for name, field in fields.items():
            default, current = field.get_default(call_default_factory=True), getattr(value, name)
            key = f"{section}.{name}"
            told = _value(current) if _public(key, current, field.annotation) else "set by the site"
            yield key, _value(default), "default" if current == default else told, field.description or ""


def _public(key: str, value: object, annotation: object) -> bool:
    """Whether a value may be handed to whoever reads a conformance statement."""
    plain = isinstance(value, bool | int | float | Enum) or get_origin(annotation) is Literal
    return plain or key in ("node.ae_title", "node.more_ae_titles")


def _value(value: object) -> str:
    match value:
        case None | "" | ():
            return "none"
        case bool():
            return "true" if value else "false"
        case tuple():
            return ", ".join(map(str, value))
        case _:
            return str(value)
