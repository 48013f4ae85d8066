"""Results as DICOM: SEG, SR, GSPS, SC, KOS, parametric maps. Imports nothing of another stage."""

from dicomnode.encode.failure import Failure, encode_failure
from dicomnode.encode.original import Correction
from dicomnode.encode.results import encode_results
from dicomnode.encode.station import Station

__all__ = ["Correction", "Failure", "Station", "encode_failure", "encode_results"]
