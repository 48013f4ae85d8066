"""DICOM-native AI node: C-STORE in, DICOM SEG and SR out."""

__version__ = "0.1.0"
