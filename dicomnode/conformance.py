"""DICOM Conformance Statement (PS3.2 annex N) of this node, made from what runs and how it is configured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from pydicom._version import __dicom_version__
from pydicom.uid import UID, Comprehensive3DSRStorage, ExplicitVRLittleEndian, SegmentationStorage
from pynetdicom.sop_class import Verification

from dicomnode import __version__
from dicomnode.app_results import MANUFACTURER
from dicomnode.conformance_page import Document, Section, Table, table
from dicomnode.conformance_sections import (
    SERVICE_SECTIONS,
    UID_COLUMN,
    class_table,
    notification,
    storage,
    undescribed,
    verification,
    web,
    yes,
)
from dicomnode.conformance_services import (
    EVERY_SERVICE,
    SopClass,
    cipher_suites,
    extended_negotiation,
    services_of,
    settings_rows,
    sop_classes,
)
from dicomnode.conformance_statuses import (
    REJECTIONS,
)
from dicomnode.dimse import requestor
from dicomnode.encode.seg import SERIES_NUMBER_BASE
from dicomnode.receive.classes import STORAGE_CLASSES
from dicomnode.receive.negotiation import UNCOMPRESSED
from dicomnode.receive.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.settings import Peer, Rule, Settings
from dicomnode.tls_context import PROTOCOL

RESULTS = {"Segmentation (SEG)": SegmentationStorage, "Comprehensive 3D SR (SR, TID 1500)": Comprehensive3DSRStorage}
"""Objects that this node makes; a test compares them with what is encoded."""


def statement(settings: Settings, issued: date) -> Document:
    """The conformance statement of this version with these settings; without addresses, names or paths of the site."""
    with services_of(settings) as services:
        classes = sop_classes(services)
        sections = [SERVICE_SECTIONS.get(type(s).__name__, undescribed)(s, classes, settings) for s in services]
        extended = extended_negotiation(services)
    beside = [c for c in classes if c.uid in {str(Verification), *STORAGE_CLASSES}]
    described = [
        verification(beside),
        storage(beside, settings),
        *sections,
        notification(classes, settings),
        web(settings),
    ]
    title = f"DICOM Conformance Statement: {MANUFACTURER} {__version__}"
    return Document(
        title,
        _cover(settings, issued),
        (
            _overview(described, classes),
            _introduction(),
            Section(
                "network",
                "Networking",
                (),
                (
                    _entities(settings),
                    _sop_classes(classes),
                    _policies(settings),
                    _acceptance(settings),
                    _contexts(classes, extended),
                ),
            ),
            Section("services", "Services", (), tuple(described)),
            Section("media", "Media services", ("Media interchange is not supported.",)),
            _results(),
            _character_sets(),
            _security(settings),
            _configuration(settings),
            Section(
                "annexes",
                "Annexes",
                (
                    "Private attributes: none are made. Those of received objects are kept as received.",
                    "Private SOP classes, private transfer syntaxes and standard extended or specialised SOP classes:"
                    " none.",
                ),
            ),
        ),
    )


def _cover(settings: Settings, issued: date) -> Table:
    found = (
        ("Product", MANUFACTURER),
        ("Version", __version__),
        ("Implementation Class UID", IMPLEMENTATION_CLASS_UID),
        ("Implementation Version Name", IMPLEMENTATION_VERSION_NAME),
        ("AE title", ", ".join(settings.node.ae_titles)),
        ("Edition of the DICOM dictionary", __dicom_version__),
        ("Date", issued.isoformat()),
    )
    return table("Cover", ("Item", "Value"), found)


def _overview(described: Iterable[Section], classes: Sequence[SopClass]) -> Section:
    by_uid = {c.uid: c for c in classes}
    found = []
    for section in described:
        mine = [by_uid[u] for b in section.blocks if isinstance(b, Table) for u in _uids(b) if u in by_uid]
        scu, scp = any(c.scu or c.reversed_scu for c in mine), any(c.scp for c in mine)
        if mine:
            found.append((section.title, len(mine), yes(scu), yes(scp)))
    return Section(
        "overview",
        "Overview",
        (
            "This node receives images, analyses them with models, and returns the results as DICOM objects. It answers"
            " queries and retrievals of what it holds. Every service is open to configured peers alone.",
            table("Network services", ("Service", "SOP classes", "User (SCU)", "Provider (SCP)"), found),
            table("Web services", ("Service", "User agent", "Origin server"), [("STOW-RS", "Yes", "No")]),
            table("Media services", ("Profile", "Creator", "Updater", "Reader"), [("none", "No", "No", "No")]),
        ),
    )


def _uids(block: Table) -> list[str]:
    place = block.columns.index(UID_COLUMN) if UID_COLUMN in block.columns else None
    return [] if place is None else [row[place] for row in block.rows]


def _introduction() -> Section:
    return Section(
        "introduction",
        "Introduction",
        (
            "For those who connect this node to other systems. It is to be read with the DICOM standard. Agreement of"
            " two statements is needed for systems to work together, and does not replace a test of the connection.",
            "'dicomnode conformance' made this document from the tables that the program itself uses and from its"
            " configuration. Names such as dimse.port are settings, see section Configuration.",
        ),
    )


def _entities(settings: Settings) -> Section:
    found = [(title, _port(settings.dimse.port), _port(settings.tls.port)) for title in settings.node.ae_titles]
    return Section(
        "entities",
        "Application entities",
        (
            table("Application entities", ("AE title", "TCP port", "TCP port, TLS"), found),
            f"As the calling AE title of associations that it opens the node uses {settings.node.ae_title}.",
            "The receiver accepts associations, answers all services and performs the sub-operations of C-MOVE. The"
            " courier sends results, notifications, and requests and reports of storage commitment. Both appear as one"
            " application entity.",
        ),
    )


def _port(port: int | None) -> str:
    return "not configured" if port is None else "chosen by the system" if port == 0 else str(port)


def _sop_classes(classes: Sequence[SopClass]) -> Section:
    return Section(
        "sop-classes",
        "SOP classes",
        (
            "SCU: on associations that this node opens. SCP: on associations that peers open. The last column: this"
            " node is the SCU on an association that a peer opened, by role selection (PS3.7 D.3.3.4), for the"
            " sub-operations of C-GET and for reports of storage commitment.",
            class_table("SOP classes", [c for c in classes if c.uid not in STORAGE_CLASSES]),
            "Storage SOP classes are listed in section Storage.",
        ),
    )


def _policies(settings: Settings) -> Section:
    dimse, delivery, tls = settings.dimse, settings.delivery, settings.tls
    found: list[tuple[str, object]] = [
        ("Application context name", "1.2.840.10008.3.1.1.1"),
        ("Largest PDU received, as acceptor (dimse.max_pdu_bytes)", f"{dimse.max_pdu_bytes} bytes"),
        ("Largest PDU received, as requestor", f"{requestor.MAX_PDU_BYTES} bytes"),
        ("Asynchronous operations window, invoked / performed", "1 / 1 (not negotiated)"),
        ("Receiver processes (dimse.workers)", dimse.workers),
        ("Connections at a time, each receiver process (dimse.max_connections)", dimse.max_connections),
        ("Connections from one address (dimse.max_connections_per_address)", dimse.max_connections_per_address),
        ("Time for A-ASSOCIATE-RQ after connecting (dimse.request_seconds)", f"{dimse.request_seconds} s"),
        ("Time for one PDU (dimse.pdu_seconds)", f"{dimse.pdu_seconds} s"),
        ("Association without traffic is aborted after (dimse.idle_seconds)", f"{dimse.idle_seconds} s"),
        ("Time for a TLS handshake (tls.handshake_seconds)", f"{tls.handshake_seconds} s"),
        ("Largest object received (dimse.max_object_mb)", f"{dimse.max_object_mb} MiB"),
        ("As requestor: time to connect (delivery.connect_seconds)", f"{delivery.connect_seconds} s"),
        ("As requestor: time for a response (delivery.response_seconds)", f"{delivery.response_seconds} s"),
        ("As requestor: objects on one association (delivery.batch)", delivery.batch),
        ("As requestor: peers served at a time (delivery.parallel)", delivery.parallel),
        ("As requestor: first and longest wait between attempts", f"{delivery.backoff_seconds} s, "
         f"{delivery.backoff_max_seconds} s"),
        ("As requestor: presentation contexts of one association", requestor.MAX_CONTEXTS),
    ]  # fmt: skip
    return Section("policies", "Association policies", (table("Association policies", ("Policy", "Value"), found),))


def _acceptance(settings: Settings) -> Section:
    del settings
    return Section(
        "acceptance",
        "Association acceptance",
        (
            "A caller is accepted when its AE title, its address where one is configured, its TLS certificate where"
            " TLS is configured, and the AE title that it calls fit one configured peer. SOP classes of services that"
            " this peer may not use are rejected as presentation contexts (abstract syntax not supported).",
            table("Rejections (A-ASSOCIATE-RJ)", ("Result", "Source", "Reason", "When"), REJECTIONS),
            "A connection beyond the limits is closed before an association is negotiated. A malformed or late PDU, a"
            " larger PDU than the largest, and a larger object than the largest end in A-ABORT.",
        ),
    )


def _contexts(classes: Sequence[SopClass], extended: Sequence[tuple[str, str, str]]) -> Section:
    sets: dict[tuple[str, ...], list[SopClass]] = {}
    for one in classes:
        if one.syntaxes:
            sets.setdefault(one.syntaxes, []).append(one)
    blocks: list[str | Table] = [
        "Of the transfer syntaxes that a peer proposes for a presentation context the first one that is supported is"
        " accepted, in the peer's order. Objects are stored in the transfer syntax in which they come. For C-GET a"
        " context in which the peer is the SCP alone gets an uncompressed transfer syntax where it is offered.",
    ]
    for syntaxes, members in sets.items():
        storage = [c for c in members if c.uid in STORAGE_CLASSES]
        others = [c.name for c in members if c.uid not in STORAGE_CLASSES]
        who = [*others, f"{len(storage)} storage SOP classes"] if storage else others
        blocks += [
            f"Accepted for: {'; '.join(who)}.",
            table("Transfer syntaxes accepted", ("Transfer syntax", "UID"), [(UID(s).name, s) for s in syntaxes]),
        ]
    blocks += [
        table("SOP Class Extended Negotiation, as SCP", ("SOP class", "Field", "Supported"), extended),
        "As requestor: stored objects are proposed in the transfer syntax in which they are stored; for C-MOVE also in"
        " the uncompressed ones, to which they are converted where the destination takes nothing else. Results are"
        f" {ExplicitVRLittleEndian.name}. Storage commitment and notifications are proposed in"
        f" {' and '.join(UID(s).name for s in UNCOMPRESSED)}.",
    ]
    return Section("contexts", "Presentation contexts", tuple(blocks))


def _results() -> Section:
    found = [(name, UID(uid).name, uid, ExplicitVRLittleEndian.name) for name, uid in RESULTS.items()]
    values = (
        ("Patient and General Study", "copied from the source images"),
        ("SOP, Series and Tracking UIDs", "below 2.25, derived from input set, model, parameters and revision: the same"
         " analysis always has the same UIDs"),
        ("Series Number", f"from {SERIES_NUMBER_BASE} + that of the source series"),
        ("Instance Number", "revision of the analysis"),
        ("General Equipment", "this node; Contributing Equipment Sequence names the model, its version and digest"),
        ("Segmentation", "Segmentation Type BINARY, Segment Algorithm Type AUTOMATIC"),
        ("Measurements", "TID 1500 Measurement Report, with references to source images and SEG"),
        ("Predecessor Documents Sequence", "the SR of the revision before, where there was one"),
    )  # fmt: skip
    return Section(
        "results",
        "Objects created",
        (
            table("Objects created", ("Object", "SOP class", UID_COLUMN, "Transfer syntax"), found),
            table("Values", ("Module or attribute", "Value"), values),
        ),
    )


def _character_sets() -> Section:
    return Section(
        "character-sets",
        "Character sets",
        (
            "Received objects keep their Specific Character Set. For the index all sets of PS3.3 C.12.1.1.2 are"
            " decoded, with code extensions; under a term that is none of them, what is not ASCII is read as U+FFFD."
            " Query keys are taken in any of them. Responses and objects created are in the default repertoire where"
            " that suffices, else in UTF-8 (ISO_IR 192).",
        ),
    )


def _security(settings: Settings) -> Section:
    tls = settings.tls
    found = (
        ("Port of TLS (tls.port)", _port(tls.port)),
        ("Oldest version (tls.minimum_version)", tls.minimum_version),
        ("Certificates of callers (tls.client_certificates)", tls.client_certificates),
        ("Callers from other machines must use TLS (tls.required)", yes(tls.required)),
        ("Revocation lists are checked (tls.crl_file)", yes(tls.crl_file)),
        ("Application protocol (ALPN)", PROTOCOL),
        ("Peers that must use TLS", sum(p.tls for p in settings.peers)),
    )
    return Section(
        "security",
        "Security",
        (
            "Secure transport: BCP 195 TLS Secure Transport Connection Profile (PS3.15 B.12), as requestor and as"
            " acceptor. Keys of RSA have 2048 bits at least, of ECDSA 256; compression, renegotiation and session"
            " tickets are off. Peers can be bound to certificates by fingerprint or name.",
            table("TLS", ("Item", "Value"), found),
            table("Cipher suites", ("Version", "Suite"), cipher_suites(tls)),
            "Without TLS a peer is known by AE title and address alone. User identity negotiation, digital signatures"
            " and attribute confidentiality profiles are not supported. Identifiers of patients are in no log.",
        ),
    )


def _configuration(settings: Settings) -> Section:
    allowed = [(word, sum(word in p.allow for p in settings.peers)) for word in EVERY_SERVICE]
    counts: list[tuple[str, object]] = [
        ("Remote application entities (peers)", len(settings.peers)),
        *((f"of which may use '{word}'", count) for word, count in allowed),
        ("of which are asked for storage commitment", sum(p.commitment for p in settings.peers)),
        ("of which can be sent to (host and port)", sum(p.reachable for p in settings.peers)),
        ("Rules", len(settings.rules)),
    ]
    columns = ("Parameter", "Default", "Value here", "Meaning")
    return Section(
        "configuration",
        "Configuration",
        (
            table("Remote application entities", ("Item", "Count"), counts),
            table("Parameters of the node", columns, list(settings_rows(settings))),
            table("Parameters of a remote application entity", ("Parameter", "Meaning"), _fields("peers", Peer)),
            table("Parameters of a rule", ("Parameter", "Meaning"), _fields("rules", Rule)),
        ),
    )


def _fields(section: str, model: Any) -> list[tuple[str, str]]:
    return [(f"{section}.{name}", field.description or "") for name, field in model.model_fields.items()]
