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

HEADER_KEYS: tuple[str, ...] = PATIENT_KEYS + STUDY_KEYS + SERIES_KEYS + INSTANCE_KEYS + FURTHER_KEYS
"""All keywords that are read from each received data set."""
