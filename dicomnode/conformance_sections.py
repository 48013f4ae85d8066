"""One section of the conformance statement for each service."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydicom.datadict import dictionary_description, tag_for_keyword
from pynetdicom.sop_class import InstanceAvailabilityNotification, Verification

from dicomnode import commitment
from dicomnode.conformance_page import Section, Table, table
from dicomnode.conformance_services import (
    SopClass,
    context_keys,
    query_keys,
)
from dicomnode.conformance_statuses import (
    ANY_CONTEXT,
    COMMITMENT,
    FAILURE_REASONS,
    PROCEDURE_STEP,
    QUERY_RETRIEVE,
    STORAGE,
    Status,
    behaviour,
    code,
    rows,
)
from dicomnode.deliver.notify import classify_status
from dicomnode.deliver.prior_scu import SERIES_RETURN, STUDY_RETURN
from dicomnode.deliver.scu import classify_store_status
from dicomnode.errors import IllegalTransition
from dicomnode.index.columns import LEVELS, UNIQUE_KEYS, Level
from dicomnode.index.keys import REQUEST_KEYS
from dicomnode.index.procedure import StepState, next_step_state
from dicomnode.receive.classes import STORAGE_CLASSES
from dicomnode.serve.procedure_step import CREATE_VALUES, SET_NOT_ALLOWED
from dicomnode.serve.retrieve import MAX_INSTANCES
from dicomnode.settings import Settings

UID_COLUMN = "SOP class UID"
_CLASS_COLUMNS = ("SOP class", UID_COLUMN, "SCU", "SCP", "SCU where the peer calls")


def class_table(title: str, classes: Iterable[SopClass]) -> Table:
    found = [(c.name, c.uid, yes(c.scu), yes(c.scp), yes(c.reversed_scu)) for c in classes]
    return table(title, _CLASS_COLUMNS, found)


def yes(value: object) -> str:
    return "Yes" if value else "No"


def _statuses(title: str, statuses: Iterable[Status]) -> Table:
    return table(title, ("Status", "Meaning", "Operations", "When"), rows(statuses))


def _taken(title: str, classify: Any) -> Table:
    return table(title, ("Status", "Behaviour"), behaviour(classify))


def verification(classes: Sequence[SopClass]) -> Section:
    return Section(
        "verification",
        "Verification",
        (
            class_table("Verification", [c for c in classes if c.uid == Verification]),
            "As SCP for peers with 'echo' in allow, answered with 0x0000. As SCU by 'dicomnode echo'.",
            _statuses("Requests that do not fit their presentation context: statuses sent", ANY_CONTEXT),
        ),
    )


def storage(classes: Sequence[SopClass], settings: Settings) -> Section:
    found = [c for c in classes if c.uid in STORAGE_CLASSES]
    del settings
    return Section(
        "storage",
        "Storage",
        (
            "As SCP for peers with 'store' in allow: level 2 (full). Data sets are kept byte for byte as received; no"
            " attribute is coerced, private attributes and digital signatures are kept, the latter unverified. An"
            " object that is here already is answered with success; with the same UID but other bytes the newest one"
            " serves queries and retrievals, and the former file is kept.",
            _statuses("C-STORE: statuses sent", STORAGE),
            "As SCU: results to the peers that rules name, files by 'dicomnode send', and the sub-operations of C-MOVE"
            " and C-GET. Results that were not taken are sent again without a limit, unless the peer refused them.",
            _taken("C-STORE: statuses received", classify_store_status),
            class_table("Storage SOP classes", found),
        ),
    )


def _query(service: Any, classes: Sequence[SopClass], settings: Settings) -> Section:
    keys = ("Tag", "Attribute", "VR", "Type", "Matching")
    levels = [
        Section(
            f"query-{level.value.lower()}",
            f"{level.value} level",
            (table(f"Keys of the {level.value} level", keys, query_keys(level)),),
        )
        for level in Level
    ]
    models = [(f"{root.value.title()} Root", ", ".join(LEVELS[root])) for root in LEVELS]
    request = "; ".join(dictionary_description(tag_for_keyword(k) or 0) for k in REQUEST_KEYS)
    unique = ", ".join(f"{UNIQUE_KEYS[level]} ({level.value})" for level in Level)
    return Section(
        "query-retrieve",
        "Query/Retrieve",
        (
            class_table("Query/Retrieve", _of(service, classes)),
            "As SCP, for peers with 'find', 'move' or 'get' in allow.",
            "As SCU, Study Root, of peers that a rule names under prior.from, where an analysis wants an earlier study:"
            " C-FIND at STUDY level by Patient ID and a range of Study Date, then at SERIES level for the latest ones"
            f" with the same Patient ID and issuer or birth date; C-MOVE of one series to {settings.node.ae_title}. A"
            " query or retrieve that fails is repeated until the time that the rule sets is over. Returned keys:"
            f" {', '.join((*STUDY_RETURN, *SERIES_RETURN))}, and the attributes that the rule looks at.",
            table("Information models", ("Model", "Levels"), models),
            f"Unique keys: {unique}. All keys below can be matched and returned, at their own level and below it; at"
            " Study Root the keys of the PATIENT level belong to the STUDY level. U: unique, R: required, O: optional"
            " key. Other keys are not matched and not returned, and the matches then have status 0xFF01.",
            f"Also taken and returned: {', '.join(context_keys())}. Retrieve AE Title is {settings.node.ae_title},"
            " Instance Availability is ONLINE.",
            f"Attributes of an item of Request Attributes Sequence: {request}.",
            f"Limits: {settings.dimse.query_max_answers} matches (dimse.query_max_answers),"
            f" {settings.dimse.query_seconds} s for a query (dimse.query_seconds),"
            f" {settings.dimse.query_per_second} queries per second (dimse.query_per_second) and"
            f" {settings.dimse.queries_at_once} at a time (dimse.queries_at_once) of one AE title,"
            f" {MAX_INSTANCES} instances in one retrieval.",
            "An attribute that is empty here "
            + ("matches" if settings.dimse.query_match_unknown else "does not match")
            + " a required key with a value (dimse.query_match_unknown). C-CANCEL is taken during C-FIND, C-MOVE and"
            " C-GET. The destination of C-MOVE is a configured peer with host and port.",
            _corrections(settings),
            _statuses("C-FIND, C-MOVE, C-GET: statuses sent", QUERY_RETRIEVE),
        ),
        tuple(levels),
    )


def _corrections(settings: Settings) -> str:
    objects = "C-MOVE, C-GET and deliveries send stored objects byte for byte as received in either case."
    if not settings.sync.apply_corrections:
        return f"Attributes are matched and returned as received (sync.apply_corrections = false). {objects}"
    return (
        "Attributes of patients and studies that were corrected at the node or at the cloud (records) are matched and"
        " returned as corrected, and only so (sync.apply_corrections); a correction in dispute is not applied. A"
        " corrected Patient ID serves as the unique key of queries and retrievals, and patients who have one ID since"
        f" are one answer. {objects} Their headers may therefore differ from answers. New results have the corrected"
        " attributes, and those of the images in Original Attributes Sequence (0400,0561), reason CORRECT."
    )


def _procedure_step(service: Any, classes: Sequence[SopClass], settings: Settings) -> Section:
    del settings
    values = [(_tag(k), dictionary_description(tag_for_keyword(k) or 0)) for k in CREATE_VALUES]
    fixed = [(f"({t >> 16:04X},{t & 0xFFFF:04X})", dictionary_description(t)) for t in sorted(SET_NOT_ALLOWED)]
    return Section(
        "mpps",
        "Modality Performed Procedure Step",
        (
            class_table("Modality Performed Procedure Step", _of(service, classes)),
            "As SCP, for peers with 'mpps' in allow. A step that is COMPLETED or DISCONTINUED is evidence that its"
            " series are complete. All attributes are kept and returned by N-GET. PS3.4 table F.7.2-1 holds, but"
            " attributes that may be empty (type 2) may also be missing.",
            table("N-CREATE: attributes that must have a value", ("Tag", "Attribute"), values),
            table("N-SET: attributes that may not be changed", ("Tag", "Attribute"), fixed),
            table("Performed Procedure Step Status", ("From", "To by N-SET"), _transitions()),
            _statuses("N-CREATE, N-SET, N-GET: statuses sent", PROCEDURE_STEP),
        ),
    )


def _transitions() -> list[tuple[str, str]]:
    found = []
    for state in StepState:
        following = []
        for other in StepState:
            try:
                following.append(next_step_state(state.value, other.value).value)
            except IllegalTransition:
                continue
        found.append((state.value, ", ".join(following) or "none"))
    return found


def _tag(keyword: str) -> str:
    tag = tag_for_keyword(keyword) or 0
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _commitment(service: Any, classes: Sequence[SopClass], settings: Settings) -> Section:
    delivery = settings.delivery
    return Section(
        "commitment",
        "Storage Commitment",
        (
            class_table("Storage Commitment Push Model", _of(service, classes)),
            "As SCP, for peers with 'commit' in allow: each instance is read back from the store and compared with what"
            " was received. The report (N-EVENT-REPORT) is sent on the association of the request while it lasts, else"
            " on one that this node opens with role selection. A report is sent again until the peer takes it.",
            _taken("N-EVENT-REPORT: statuses received", commitment.classify_report_status),
            "As SCU, of peers with commitment = true, after results were delivered. After the response the association"
            f" is kept {delivery.commitment_wait_seconds} s (delivery.commitment_wait_seconds) for the report; a report"
            " is also taken on associations that the peer opens, with or without role selection. Without a report the"
            f" peer is asked again after {delivery.commitment_timeout_seconds} s"
            " (delivery.commitment_timeout_seconds).",
            _statuses("N-ACTION, N-EVENT-REPORT: statuses sent", COMMITMENT),
            table(
                "Failure Reason (0008,1197)",
                ("Value", "When"),
                [(code(v), text) for v, text in FAILURE_REASONS.items() if v != commitment.Verdict.committed],
            ),
            f"One request has at most {commitment.MAX_REFERENCES} references. Storage media are not named in reports.",
        ),
    )


def undescribed(service: Any, classes: Sequence[SopClass], settings: Settings) -> Section:
    """A service that nobody has written a section for still shows what it is."""
    del settings
    name = type(service).__name__
    text = (type(service).__doc__ or "").split("\n\n")[0].strip()
    return Section(name.lower(), name, (class_table(name, _of(service, classes)), text))


SERVICE_SECTIONS = {"QueryRetrieve": _query, "ProcedureSteps": _procedure_step, "Commitment": _commitment}
"""Name of the service's class in :mod:`dicomnode.serve` -> its section."""


def _of(service: Any, classes: Sequence[SopClass]) -> list[SopClass]:
    return [c for c in classes if c.uid in service.classes]


def notification(classes: Sequence[SopClass], settings: Settings) -> Section:
    del settings
    return Section(
        "notification",
        "Instance Availability Notification",
        (
            class_table(
                "Instance Availability Notification", [c for c in classes if c.uid == InstanceAvailabilityNotification]
            ),
            "As SCU: a peer that a rule names in notify is told by N-CREATE, once results can be retrieved, from this"
            " node or from the peer that they were delivered to. Instance Availability is ONLINE. The attributes are"
            " those of PS3.4 table R.3.2-1.",
            _taken("N-CREATE: statuses received", classify_status),
        ),
    )


def web(settings: Settings) -> Section:
    state = "is configured" if settings.cloud.stow_url else "is not configured, so nothing is sent"
    return Section(
        "stow",
        "DICOMweb: STOW-RS",
        (
            f"As user agent (PS3.18 10.5): results are stored at an endpoint (cloud.stow_url), which {state}. An"
            " instance counts as stored when the reply names it in Referenced SOP Sequence.",
            "Unless every rule of an analysis keeps identity (cloud_identity), what leaves is de-identified: attributes"
            " of an allow-list, other UIDs, a pseudonym for Patient's Name and ID, shifted dates, Patient Identity"
            " Removed YES and Longitudinal Temporal Information Modified MODIFIED. Key images leave so only where their"
            " source says Burned In Annotation NO (cloud.key_images).",
        ),
    )
