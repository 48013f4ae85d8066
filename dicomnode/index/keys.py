"""Which DICOM attributes the index holds in columns, by level (PS3.4 C.6).

Every instance also keeps all attributes that were read as JSON, so a rule or a later
service can use any of them.
"""

from __future__ import annotations

PATIENT_KEYS = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex")

STUDY_KEYS = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "StudyDescription",
    "ReferringPhysicianName",
    "PatientAge",
    "TimezoneOffsetFromUTC",
)

SERIES_KEYS = (
    "SeriesInstanceUID",
    "Modality",
    "SeriesNumber",
    "SeriesDescription",
    "SeriesDate",
    "SeriesTime",
    "BodyPartExamined",
    "ProtocolName",
    "Laterality",
    "PatientPosition",
    "Manufacturer",
    "ManufacturerModelName",
    "StationName",
    "InstitutionName",
    "FrameOfReferenceUID",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
)

INSTANCE_KEYS = (
    "SOPInstanceUID",
    "SOPClassUID",
    "InstanceNumber",
    "AcquisitionNumber",
    "ImageType",
    "ContentDate",
    "ContentTime",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)

FURTHER_KEYS = (
    "SpecificCharacterSet",
    "AcquisitionDate",
    "AcquisitionTime",
    "BitsAllocated",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "GantryDetectorTilt",
    "ImageComments",
    "ImagesInAcquisition",
    "KVP",
    "NumberOfSeriesRelatedInstances",
    "NumberOfStudyRelatedInstances",
    "PhotometricInterpretation",
    "PixelSpacing",
    "SamplesPerPixel",
    "ScanOptions",
    "SequenceName",
    "SliceLocation",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ViewPosition",
)

REQUEST_SEQUENCE = "RequestAttributesSequence"
REQUEST_KEYS = (
    "RequestedProcedureID",
    "ScheduledProcedureStepID",
    "AccessionNumber",
    "StudyInstanceUID",
    "RequestedProcedureDescription",
    "ScheduledProcedureStepDescription",
    "ReasonForTheRequestedProcedure",
    "PlacerOrderNumberImagingServiceRequest",
    "FillerOrderNumberImagingServiceRequest",
)
"""What is kept of each item of Request Attributes Sequence (0040,0275), for each series (PS3.3 10.6)."""

SEQUENCE_KEYS = (
    *(f"{REQUEST_SEQUENCE}.{key}" for key in REQUEST_KEYS),
    "ReferencedPerformedProcedureStepSequence.ReferencedSOPInstanceUID",
)

HEADER_KEYS: tuple[str, ...] = PATIENT_KEYS + STUDY_KEYS + SERIES_KEYS + INSTANCE_KEYS + FURTHER_KEYS + SEQUENCE_KEYS
"""All that is read from each received data set, as :class:`dicomnode.header.Wanted` takes it."""

TIMES: dict[str, str] = {
    "StudyDate": "StudyTime",
    "SeriesDate": "SeriesTime",
    "AcquisitionDate": "AcquisitionTime",
    "ContentDate": "ContentTime",
    "PerformedProcedureStepStartDate": "PerformedProcedureStepStartTime",
}
"""Dates and the times that belong to them: together they are moments."""

REQUIRED_KEYS = frozenset(
    {
        "PatientName",
        "PatientID",
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "StudyID",
        "Modality",
        "SeriesNumber",
        "InstanceNumber",
    }
)
"""Required keys of PS3.4 tables C.6-1 to C.6-5."""
