"""The information models of PS3.4 C.6 as SQL: levels, and a column or expression for each key. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache

from dicomnode.index.keys import (
    HEADER_KEYS,
    INSTANCE_KEYS,
    PATIENT_KEYS,
    REQUEST_KEYS,
    REQUEST_SEQUENCE,
    SERIES_KEYS,
    STUDY_KEYS,
)

ZONE_KEY = "TimezoneOffsetFromUTC"


class Level(StrEnum):
    """Query/Retrieve Level (0008,0052)."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class Root(StrEnum):
    PATIENT = "PATIENT"
    STUDY = "STUDY"


LEVELS: Mapping[Root, tuple[Level, ...]] = {
    Root.PATIENT: (Level.PATIENT, Level.STUDY, Level.SERIES, Level.IMAGE),
    Root.STUDY: (Level.STUDY, Level.SERIES, Level.IMAGE),
}
UNIQUE_KEYS: Mapping[Level, str] = {
    Level.PATIENT: "PatientID",
    Level.STUDY: "StudyInstanceUID",
    Level.SERIES: "SeriesInstanceUID",
    Level.IMAGE: "SOPInstanceUID",
}


FROM: Mapping[Level, str] = {
    Level.PATIENT: "patients p",
    Level.STUDY: "studies st JOIN patients p ON p.id = st.patient_id",
    Level.SERIES: "series se JOIN studies st ON st.id = se.study_id JOIN patients p ON p.id = st.patient_id",
    Level.IMAGE: "instances i JOIN series se ON se.id = i.series_id JOIN studies st ON st.id = se.study_id"
    " JOIN patients p ON p.id = st.patient_id",
}


def _distinct(column: str, source: str) -> str:
    return (
        f"(SELECT coalesce((SELECT group_concat(v, '\\') FROM (SELECT DISTINCT {column} AS v FROM {source}"
        f" AND {column} <> '' ORDER BY 1)), ''))"
    )


def _count(source: str) -> str:
    return f"(SELECT count(*) FROM {source})"


_OF_STUDY = "series x JOIN instances y ON y.series_id = x.id WHERE x.study_id = st.id"
_OF_PATIENT = "studies w JOIN series x ON x.study_id = w.id"
_REQUEST_OBJECT = ", ".join(f"'{key}', r.\"{key}\"" for key in REQUEST_KEYS)
_COMPUTED: Mapping[Level, Mapping[str, str]] = {
    Level.PATIENT: {
        "NumberOfPatientRelatedStudies": _count("studies w WHERE w.patient_id = p.id"),
        "NumberOfPatientRelatedSeries": _count(f"{_OF_PATIENT} WHERE w.patient_id = p.id"),
        "NumberOfPatientRelatedInstances": _count(
            f"{_OF_PATIENT} JOIN instances y ON y.series_id = x.id WHERE w.patient_id = p.id"
        ),
    },
    Level.STUDY: {
        "ModalitiesInStudy": _distinct("Modality", "series WHERE study_id = st.id"),
        "SOPClassesInStudy": _distinct("y.SOPClassUID", _OF_STUDY),
        "NumberOfStudyRelatedSeries": _count("series x WHERE x.study_id = st.id"),
        "NumberOfStudyRelatedInstances": _count(_OF_STUDY),
    },
    Level.SERIES: {
        "NumberOfSeriesRelatedInstances": _count("instances y WHERE y.series_id = se.id"),
        REQUEST_SEQUENCE: (
            f"(SELECT json_group_array(json_object({_REQUEST_OBJECT})) FROM"
            " (SELECT * FROM series_requests q WHERE q.series_id = se.id ORDER BY q.id) r)"
        ),
    },
    Level.IMAGE: {},
}

CONTEXT_KEYS = frozenset({"QueryRetrieveLevel", "SpecificCharacterSet", "RetrieveAETitle", "InstanceAvailability"})
"""Not matched: they frame the query, or say the same for every answer."""


@lru_cache
def columns(level: Level) -> Mapping[str, str]:
    """Keyword -> SQL expression of what can be asked for at a level: its own keys and those above."""
    depth = LEVELS[Root.PATIENT].index(level)
    found = {k: f'p."{k}"' for k in PATIENT_KEYS}
    if depth >= 1:
        found |= {k: f'st."{k}"' for k in STUDY_KEYS} | {"PatientName": 'st."PatientName"'}
    if depth >= 2:
        found |= {k: f'se."{k}"' for k in SERIES_KEYS}
    if depth >= 3:
        found |= {k: f'i."{k}"' for k in INSTANCE_KEYS}
        further = {k for k in HEADER_KEYS if "." not in k} - set(found) - CONTEXT_KEYS
        found |= {k: f"coalesce(json_extract(i.attributes, '$.{k}'), '')" for k in sorted(further)}
    for above in LEVELS[Root.PATIENT][: depth + 1]:
        found |= _COMPUTED[above]
    return found


_OF_INSTANCE = "json_extract({}.attributes, '$.TimezoneOffsetFromUTC')"
OWN_ZONES: Mapping[Level, str] = {
    Level.PATIENT: "''",
    Level.STUDY: f'st."{ZONE_KEY}"',
    Level.SERIES: (
        f"coalesce((SELECT {_OF_INSTANCE.format('y')} FROM instances y WHERE y.series_id = se.id LIMIT 1), '')"
    ),
    Level.IMAGE: f"coalesce({_OF_INSTANCE.format('i')}, '')",
}
"""The offset of the times of an entity; equipment that was replaced in between may differ within a study."""

KNOWN_KEYS = tuple(
    sorted({k for k in HEADER_KEYS if "." not in k} | {*CONTEXT_KEYS, *columns(Level.IMAGE), *_COMPUTED[Level.STUDY]})
)
"""Keywords that a query is read for."""
