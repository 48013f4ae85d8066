"""An SR that says that, and why, an analysis was impossible or failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from highdicom.sr import CodeContentItem, CodedConcept, ContainerContentItem, ContentSequence, TextContentItem
from highdicom.sr import RelationshipTypeValues as Relationship

from dicomnode.encode.common import Context, Provenance, clean_text, quiet_pydicom
from dicomnode.encode.headers import SourceHeaders, read_headers
from dicomnode.encode.original import Correction, apply_correction
from dicomnode.encode.sr import build_report, report_head, source_evidence
from dicomnode.encode.station import Station
from dicomnode.errors import InputError, NodeError, StorageError
from dicomnode.records import EncodedObject, ModelIdentity, ResultIdentity, SourceInstance

_SUMMARY = CodedConcept("111017", "DCM", "CAD Processing and Findings Summary")
_NONE_SUCCEEDED = CodedConcept("111245", "DCM", "No algorithms succeeded; without findings")  # CID 6047
_COMMENT = CodedConcept("121106", "DCM", "Comment")


@dataclass(frozen=True, slots=True)
class Failure:
    """``refused``: the input does not meet the model's contract, else the attempts are used up.

    ``reason``: ``CODE: cause. hint`` of a refusal, or the last error; without patient data.
    """

    refused: bool
    reason: str
    attempts: int = 0


def encode_failure(
    failure: Failure,
    identity: ResultIdentity,
    model: ModelIdentity,
    sources: Sequence[SourceInstance],
    *,
    station: Station,
    correction: Correction | None = None,
) -> EncodedObject:
    """Comprehensive 3D SR without measurements; every readable or unreadable source is its evidence.

    Patient and study come from the first source file that can be read. Raises ``NodeError`` when
    none can be.
    """
    with quiet_pydicom():
        headers = apply_correction(_headers(sources), correction)
        provenance = Provenance.of(model, identity, "", zone=headers.zone)
        context = Context(identity, model, provenance, headers, tuple(sources), station)
        items = [
            CodeContentItem(_SUMMARY, _NONE_SUCCEEDED, Relationship.CONTAINS),
            *[TextContentItem(_COMMENT, clean_text(t), Relationship.CONTAINS) for t in sentences(failure, model.name)],
        ]
        box = ContainerContentItem(
            CodedConcept("C0034375", "UMLS", "Qualitative Evaluations"), relationship_type=Relationship.CONTAINS
        )
        box.ContentSequence = ContentSequence(items)
        return build_report(
            [*report_head(context), box],
            evidence=source_evidence(context),
            description=f"AI {context.provenance.name}: NOT ANALYSED",
            context=context,
        )


def sentences(failure: Failure, model: str) -> tuple[str, ...]:
    """What the radiologist reads: what did not happen, why, and what follows from it."""
    if failure.refused:
        code, _, text = failure.reason.partition(": ")
        first = f"This series was NOT analysed by {model}: it does not meet the conditions of the model."
        why = f"Reason: {text[:1].upper()}{text[1:]} (code {code})" if text else f"Reason: {code}"
    else:
        first = f"This series was NOT analysed by {model}: the analysis failed {failure.attempts} times."
        why = f"Technical reason, for the operator of the node: {failure.reason}"
    return first, why, "The absence of AI findings says nothing about the images.", "Made by software."


def _headers(sources: Sequence[SourceInstance]) -> SourceHeaders:
    for source in sources:
        try:
            return read_headers([], [source])
        except (InputError, StorageError, NodeError):
            continue
    raise NodeError("report a failure", "none of the source files can be read", "See the job's reason in the job list")
