"""The node that writes the results: General Equipment (PS3.3 C.7.5.1, C.7.5.2)."""

from __future__ import annotations

from dataclasses import dataclass

from dicomnode.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Station:
    """This node as equipment; every text is cut to the 64 characters of VR LO.

    ``manufacturer``, ``model_name``, ``software_versions`` and ``serial_number`` are Type 1
    in a SEG (Enhanced General Equipment), so none may be empty.
    """

    manufacturer: str
    model_name: str
    software_versions: str
    serial_number: str
    institution: str = ""

    def __post_init__(self) -> None:
        for name in ("manufacturer", "model_name", "software_versions", "serial_number"):
            if not str(getattr(self, name)).strip():
                raise SettingsError("describe this node", f"{name} is empty", "Results must name their maker.")
