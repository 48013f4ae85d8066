"""Two patients whose names look alike, ``A^B`` and ``A`` of the issuer ``B``, are two patients."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from dicomnode.cloud_settings import OFF
from dicomnode.errors import StorageError
from dicomnode.index import database
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.corrections import corrected_study, read_corrections
from dicomnode.index.database import Database
from dicomnode.index.mapping import PseudonymRows
from dicomnode.index.record_reviews import Reviews, demographics
from dicomnode.index.schema import migrations
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.sync.departure import Departures
from tests.index.rows import FakeClock, instance
from tests.sync.index_case import make_settings

CODEC = Pseudonyms(b"k" * 32)
ALIKE = (("A^B", ""), ("A", "B"))
ALIAS = {one: CODEC.patient(*one) for one in ALIKE}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = Database(tmp_path, FakeClock())
    yield db
    db.close()


def store(db: Database, *patients: tuple[str, str]) -> None:
    for n, (number, issuer) in enumerate(patients):
        told = {"PatientID": number, "IssuerOfPatientID": issuer, "PatientSex": "O", "PatientName": f"N{n}"}
        Catalogue(db).commit([instance(series=f"1.2.20.{n}", study=f"1.2.10.{n}", sop=f"1.2.30.{n}", **told)])


def keep(db: Database, codec: Pseudonyms | None = CODEC) -> None:
    PseudonymRows(db).keep({("patient", ALIAS[one]): "A^B" for one in ALIKE}, codec)


def correct(db: Database, alias: str, **values: str) -> None:
    Reviews(db, OFF).change("patient", alias, values, begin=demographics(db, alias, ""))


def corrected(db: Database) -> dict[str, Any]:
    found = read_corrections(db).patients
    return {r["PatientID"]: dict(found[r["id"]]) for r in db.rows("SELECT * FROM patients") if r["id"] in found}


def test_a_correction_is_of_the_patient_whose_pseudonym_it_names(db: Database) -> None:
    store(db, *ALIKE)
    keep(db)
    for one, sex in zip(ALIKE, ("M", "F"), strict=True):
        correct(db, ALIAS[one], PatientSex=sex)
        told = {r["pseudonym"]: r["issuer"] for r in PseudonymRows(db).find("A^B")}
        assert told == {ALIAS["A^B", ""]: "", ALIAS["A", "B"]: "B"}, "both, and which is which"
    assert corrected(db) == {"A^B": {"PatientSex": "M"}, "A": {"PatientSex": "F"}}
    one, other = (corrected_study(db, f"1.2.30.{n}") for n in range(2))
    assert one and other and (one.values, other.values) == ({"PatientSex": "M"}, {"PatientSex": "F"})


@pytest.mark.parametrize("one", ALIKE)
def test_one_of_both_alone_is_corrected(db: Database, one: tuple[str, str]) -> None:
    store(db, *ALIKE)
    keep(db)
    correct(db, ALIAS[one], PatientSex="M")
    assert corrected(db) == {one[0]: {"PatientSex": "M"}}
    assert demographics(db, ALIAS[one], "")["PatientID"] == one[0]


@pytest.mark.parametrize("here", [ALIKE, ALIKE[1:]])
def test_pseudonyms_of_an_earlier_version_stay_and_are_told_apart_by_the_key(
    tmp_path: Path, here: tuple[tuple[str, str], ...]
) -> None:
    """Until then nobody is corrected by what may be meant for another; who is here alone is."""
    plain = CODEC.patient("A")
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    migrations.apply(sqlite_utils.Database(connection), stop_before="m0041_issuers")
    with connection:
        rows = [(ALIAS[one], "A^B") for one in ALIKE] + [(plain, "A"), ("of another key", "A^B")]
        connection.executemany("INSERT INTO pseudonyms VALUES (?, 'patient', ?, '2026')", rows)
    connection.close()
    key = tmp_path / "cloud-pseudonyms.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    db = Database(tmp_path, FakeClock())
    try:
        store(db, *here)
        with db.transaction():
            for alias in (*ALIAS.values(), "of another key"):
                data = f'{{"PatientSex": "{"M" if alias == ALIAS["A", "B"] else "F"}"}}'
                row = {"type": "patient", "record_id": alias, "version": 1, "data": data, "changed_time": "2026"}
                db.insert("records", row)
        assert corrected(db).keys() == ({"A"} if len(here) == 1 else set())
        Departures(make_settings(tmp_path), db).ready()
        rows = db.rows("SELECT pseudonym, original, issuer FROM pseudonyms")
        assert {(r["pseudonym"], r["original"]): r["issuer"] for r in rows} == {
            (ALIAS["A^B", ""], "A^B"): "",
            (ALIAS["A", "B"], "A^B"): "B",
            (plain, "A"): "",
            ("of another key", "A^B"): None,
        }
        with db.transaction():
            db.execute("DELETE FROM records WHERE record_id = 'of another key'")
        assert corrected(db)["A"] == {"PatientSex": "M"}, "and by nothing that is another's"
        assert corrected(db).get("A^B", {"PatientSex": "F"}) == {"PatientSex": "F"}
    finally:
        db.close()


def test_they_are_told_apart_as_soon_as_the_index_takes_it(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(db, None)
    assert {r["issuer"] for r in PseudonymRows(db).find("A^B")} == {None}
    key = db.data_dir / "cloud-pseudonyms.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    departures = Departures(make_settings(db.data_dir), db)
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 20)
    fd = os.open(db.data_dir / "index.turn", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)  # another process writes
    with pytest.raises(StorageError):
        departures.ready()
    os.close(fd)
    departures.ready()
    assert {r["issuer"] for r in PseudonymRows(db).find("A^B")} == {"", "B"}


@pytest.mark.parametrize(
    "pair", [("A", ""), ("A^B", ""), ("A", "B"), ("A^B", "C^D"), ("^", "^"), ("", "B"), ("A^", "")]
)
def test_the_key_tells_the_issuer_of_what_it_made(pair: tuple[str, str]) -> None:
    number, issuer = pair
    original = f"{number}^{issuer}" if issuer else number
    assert CODEC.issuer(CODEC.patient(*pair), original) == issuer
    assert CODEC.issuer(Pseudonyms(b"o" * 32).patient(*pair), original) is None
