"""Series to send, made fast: one template, and new UIDs of the same length written over its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tests.e2e.harness import make_series
from tests.peers import Item

_LENGTH = 44


@dataclass(frozen=True, slots=True)
class Made:
    study_uid: str
    series_uid: str
    items: Sequence[Item]


def _uid(chance: random.Random) -> str:
    """A UID of the UUID root (PS3.5 B.2) with a fixed length."""
    return f"2.25.{chance.randrange(10**38, 2**127)}"


@cache
def _template(description: str, small: bool) -> Made:
    def change(ds: Any, number: int) -> None:
        ds.SOPInstanceUID = f"2.25.{10**38 + number}"
        ds.SeriesInstanceUID, ds.StudyInstanceUID = f"2.25.{2 * 10**37 + 10**38}", f"2.25.{3 * 10**37 + 10**38}"
        ds.FrameOfReferenceUID = f"2.25.{4 * 10**37 + 10**38}"
        ds.PatientID = "9" * 20
        if small:
            ds.Rows = ds.Columns = 8
            ds.PixelData = bytes(128)

    series = make_series(description, change=change)
    return Made(str(series.datasets[0].StudyInstanceUID), str(series.datasets[0].SeriesInstanceUID), series.items)


def make(description: str, chance: random.Random, *, small: bool = False) -> Made:
    """A thorax that the model accepts; ``small``: 32 images of about 1 KB that no model looks at."""
    template = _template(description, small)
    study, series, frame = _uid(chance), _uid(chance), _uid(chance)
    patient = f"{chance.randrange(10**20):020d}"
    items = []
    for item in template.items:
        instance = _uid(chance)
        data = item.data
        for old, new in (
            (item.sop_instance_uid, instance),
            (template.study_uid, study),
            (template.series_uid, series),
            (f"2.25.{4 * 10**37 + 10**38}", frame),
            ("9" * 20, patient),
        ):
            assert len(old) == len(new)
            data = data.replace(old.encode(), new.encode())
        items.append(replace(item, sop_instance_uid=instance, data=data))
    return Made(study, series, items)
