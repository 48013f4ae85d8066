"""A modality that reports performed procedure steps, with pynetdicom as its DIMSE stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import ModalityPerformedProcedureStep, ModalityPerformedProcedureStepRetrieve

STEP, RETRIEVE = ModalityPerformedProcedureStep, ModalityPerformedProcedureStepRetrieve
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def scheduled(study_uid: str) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = study_uid
    item.ReferencedStudySequence = []
    for keyword in ("AccessionNumber", "RequestedProcedureID", "RequestedProcedureDescription"):
        setattr(item, keyword, "")
    item.ScheduledProcedureStepID = item.ScheduledProcedureStepDescription = ""
    item.ScheduledProtocolCodeSequence = []
    return item


def begun(study_uid: str, **changes: Any) -> Dataset:
    """Attributes of an N-CREATE as a modality sends them; a change to None leaves the attribute out."""
    ds = Dataset()
    ds.ScheduledStepAttributesSequence = [scheduled(study_uid)]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Xylocanary^Test", "P1", "", ""
    ds.ReferencedPatientSequence = []
    ds.PerformedProcedureStepID, ds.PerformedStationAETitle = "PPS1", "MOD1"
    ds.PerformedStationName = ds.PerformedLocation = ""
    ds.PerformedProcedureStepStartDate, ds.PerformedProcedureStepStartTime = "20260102", "030405"
    ds.PerformedProcedureStepStatus = "IN PROGRESS"
    ds.PerformedProcedureStepDescription = ds.PerformedProcedureTypeDescription = ""
    ds.ProcedureCodeSequence = []
    ds.PerformedProcedureStepEndDate = ds.PerformedProcedureStepEndTime = ""
    ds.PerformedProcedureStepDiscontinuationReasonCodeSequence = []
    ds.Modality, ds.StudyID = "CT", ""
    ds.PerformedProtocolCodeSequence, ds.PerformedSeriesSequence = [], []
    return _changed(ds, changes)


def series_item(series_uid: str, instances: Iterable[str], others: Iterable[str] = ()) -> Dataset:
    item = Dataset()
    item.PerformingPhysicianName = item.OperatorsName = item.SeriesDescription = item.RetrieveAETitle = ""
    item.ProtocolName, item.SeriesInstanceUID = "Thorax", series_uid
    item.ReferencedImageSequence = [_reference(uid) for uid in instances]
    item.ReferencedNonImageCompositeSOPInstanceSequence = [_reference(uid) for uid in others]
    return item


def _reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CT_IMAGE, uid
    return item


def ended(status: str, series: Mapping[str, Sequence[str]], reason: str = "", **changes: Any) -> Dataset:
    """Modification list of the last N-SET; ``reason`` is a code of CID 9300."""
    ds = Dataset()
    ds.PerformedProcedureStepStatus = status
    ds.PerformedProcedureStepEndDate, ds.PerformedProcedureStepEndTime = "20260102", "031405"
    ds.PerformedSeriesSequence = [series_item(uid, instances) for uid, instances in series.items()]
    if reason:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = reason, "DCM", "a reason"
        ds.PerformedProcedureStepDiscontinuationReasonCodeSequence = [code]
    return _changed(ds, changes)


def _changed(ds: Dataset, changes: Mapping[str, Any]) -> Dataset:
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


class Modality:
    """One association for procedure steps."""

    def __init__(self, port: int, ae_title: str = "MOD1") -> None:
        ae = AE(ae_title=ae_title)
        ae.add_requested_context(STEP)
        ae.add_requested_context(RETRIEVE)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
        self.assoc = ae.associate("127.0.0.1", port, ae_title="DICOMNODE")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.assoc.is_established:
            self.assoc.release()

    def create(self, ds: Dataset, uid: str | None = None) -> Any:
        """Status data set and attribute list of the response."""
        return self.assoc.send_n_create(ds, STEP, uid)

    def set(self, uid: str, ds: Dataset) -> Any:
        return self.assoc.send_n_set(ds, STEP, uid)

    def get(self, uid: str, tags: Sequence[int] = ()) -> Any:
        return self.assoc.send_n_get(list(tags), RETRIEVE, uid)

    def begin(self, study_uid: str, **changes: Any) -> str:
        """A step that is in progress; its UID."""
        uid = str(generate_uid())
        status, _ = self.create(begun(study_uid, **changes), uid)
        assert status.Status == 0x0000, status
        return uid

    def end(self, uid: str, status: str, series: Mapping[str, Sequence[str]], reason: str = "") -> None:
        answer, _ = self.set(uid, ended(status, series, reason))
        assert answer.Status == 0x0000, answer
