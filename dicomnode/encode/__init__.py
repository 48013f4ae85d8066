"""Results as DICOM: SEG, SR, provenance. Imports nothing of another stage."""

from dicomnode.encode.results import encode_results
from dicomnode.encode.station import Station

__all__ = ["Station", "encode_results"]
