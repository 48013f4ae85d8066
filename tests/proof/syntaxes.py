"""Source files in each transfer syntax, by encoders that are not this program's: DCMTK, pydicom and its plug-ins."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path

import pydicom
from pydicom.uid import UID

from dicomnode.records import SourceInstance
from tests.encode.encode_case import program

LOSSLESS = {
    "1.2.840.10008.1.2": ("dcmconv", "+ti"),
    "1.2.840.10008.1.2.1": ("dcmconv", "+te"),
    "1.2.840.10008.1.2.2": ("dcmconv", "+tb"),
    "1.2.840.10008.1.2.1.99": ("dcmconv", "+td"),
    "1.2.840.10008.1.2.5": ("dcmcrle",),
    "1.2.840.10008.1.2.4.57": ("dcmcjpeg", "+el"),
    "1.2.840.10008.1.2.4.70": ("dcmcjpeg", "+e1"),
    "1.2.840.10008.1.2.4.80": ("dcmcjpls", "+el"),
    "1.2.840.10008.1.2.4.90": ("pydicom",),
}
LOSSY = {
    "1.2.840.10008.1.2.4.50": ("dcmcjpeg", "+eb", "+q", "95", "+un"),
    "1.2.840.10008.1.2.4.51": ("dcmcjpeg", "+ee", "+q", "95", "+un"),
    "1.2.840.10008.1.2.4.81": ("dcmcjpls", "+en", "+md", "2", "+un"),
    "1.2.840.10008.1.2.4.91": ("pydicom",),
}
METHODS = {  # PS3.3 C.7.6.1.1.5.1
    "1.2.840.10008.1.2.4.50": "ISO_10918_1", "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1", "1.2.840.10008.1.2.4.91": "ISO_15444_1",
}  # fmt: skip
BITS = {"1.2.840.10008.1.2.4.50": 8, "1.2.840.10008.1.2.4.51": 8, "1.2.840.10008.1.2.4.81": 12}
"""JPEG Extended of 12 bits is read by no decoder whose licence fits; the series is refused with its reason."""


def in_syntax(source: SourceInstance, uid: str, folder: Path) -> SourceInstance:
    """The same instance in another transfer syntax; its UID stays."""
    tool, *options = (LOSSLESS | LOSSY)[uid]
    path = folder / source.path.name
    if tool == "pydicom":
        _jpeg_2000(source.path, path, uid)
    else:
        done = subprocess.run([program(tool), *options, source.path, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    assert (ds.file_meta.TransferSyntaxUID, ds.SOPInstanceUID) == (uid, source.sop_instance_uid)
    return SourceInstance(source.sop_instance_uid, source.sop_class_uid, uid, path, "0" * 64)


def _jpeg_2000(source: Path, target: Path, uid: str) -> None:
    ds = pydicom.dcmread(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if uid in LOSSY:
            ds.compress(UID(uid), j2k_cr=[4], generate_instance_uid=False)
            ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", 4
            ds.LossyImageCompressionMethod = METHODS[uid]
        else:
            ds.compress(UID(uid), generate_instance_uid=False)
    ds.save_as(target, enforce_file_format=True)
