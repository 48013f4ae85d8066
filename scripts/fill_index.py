#!/usr/bin/env python3
"""Fill an index with made-up studies, to measure how queries and intake do with a million instances.

The rows come from the catalogue itself, so they are what intake would have written; the files
that they name do not exist. The same seed gives the same index.

    scripts/fill_index.py DATA_DIR [--count 1000000] [--series 2] [--seed 1]
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database

BATCH = 2000
FIRST_DAY = date(2022, 1, 1)
DAYS = 1000
ROOT = "1.2.826.0.1.3680043.10.999"
CT_IMAGE, MR_IMAGE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"

_FAMILIES = (
    "Adams Almeida Andersen Bauer Becker Bianchi Brown Chen Clark Costa Davies Dubois Evans Fernández Fischer Fontaine"
    " García Gruber Hansen Hoffmann Horvat Ivanova Jensen Johnson Jones Kaya Keller Kim Kowalski Krüger Kumar"
    " Larsen Lefèvre Lopez Maier Martin Meier Meyer Moreau Moretti Müller Nakamura Nguyen Nielsen Novák Nowak O'Brien"
    " Öztürk Papadopoulos Patel Pereira Petrov Ricci Rodríguez Rossi Sato Schmidt Schneider Schröder Silva Singh"
    " Smith Suzuki Svensson Szabó Takahashi Tanaka Taylor Thompson Tóth Vogel Wagner Walker Wang Weber White Williams"
    " Wilson Wójcik Wright Yamada Yılmaz Zhang Zimmermann"
)
_GIVENS = (
    "Aiko Alessandra Amélie Anna Antonio Ben Carlos Chloé Claudia David Elena Emma Erik Fatma Felix Georg Hana"
    " Hans Hiroshi Ines Ivan Jan João Johann John Jürgen Karin Kenji Lars Laura Léa Luca Lucía Magda Marco Maria Mary"
    " Mehmet Michael Mia Nina Noah Olga Paul Pedro Petra Priya Rafael René Sara Sofia Søren Stefan Tarō Thomas Ursula"
    " Vera Viktor Wei Yuki Zoë"
)
FAMILIES, GIVENS = _FAMILIES.split(), _GIVENS.split()


def people(count: int, chance: random.Random) -> list[dict[str, str]]:
    """Patients with names as they are: common ones often."""
    found = []
    for number in range(count):
        family, given = chance.choice(FAMILIES), chance.choice(GIVENS)
        name = f"{family}^{given}" + (f"^{chance.choice(GIVENS)}" if chance.random() < 0.2 else "")
        if family == "Yamada":
            name += "=山田^太郎=やまだ^たろう"
        born = date(1930, 1, 1) + timedelta(days=chance.randrange(33_000))
        found.append(
            {
                "PatientID": f"PID{number:07}",
                "PatientName": name.upper() if chance.random() < 0.3 else name,
                "PatientBirthDate": f"{born:%Y%m%d}",
                "PatientSex": chance.choice("MF"),
            }
        )
    return found


def instances(studies: int, series: int, count: int, seed: int) -> Iterator[NewInstance]:
    """Every instance of ``studies`` x ``series`` x ``count``; each person has 1.5 studies on average."""
    chance = random.Random(seed)
    patients = people(max(1, studies * 2 // 3), chance)
    for study in range(studies):
        day = FIRST_DAY + timedelta(days=chance.randrange(DAYS))
        study_uid = f"{ROOT}.{chance.getrandbits(60)}.{study}"
        modality, sop_class = chance.choice((("CT", CT_IMAGE), ("MR", MR_IMAGE)))
        of_study = {
            **chance.choice(patients),
            "StudyInstanceUID": study_uid,
            "StudyDate": f"{day:%Y%m%d}",
            "StudyTime": f"{chance.randrange(7, 20):02}{chance.randrange(60):02}{chance.randrange(60):02}",
            "StudyID": str(chance.randrange(10_000)),
            "AccessionNumber": f"A{day:%y}{study:07}",
            "StudyDescription": f"{modality} {chance.choice(('THORAX', 'ABDOMEN', 'HEAD', 'KNEE'))}",
            "ReferringPhysicianName": f"{chance.choice(FAMILIES)}^{chance.choice(GIVENS)}",
            "Modality": modality,
            "SOPClassUID": sop_class,
            "Manufacturer": "EXAMPLE",
            "StationName": f"{modality}{chance.randrange(1, 4)}",
            "InstitutionName": "Example Hospital",
            "Rows": "512",
            "Columns": "512",
            "BitsAllocated": "16",
            "SamplesPerPixel": "1",
            "PhotometricInterpretation": "MONOCHROME2",
            "PixelSpacing": "0.703125\\0.703125",
            "ImageType": "ORIGINAL\\PRIMARY\\AXIAL",
            "SpecificCharacterSet": "ISO_IR 192",
        }
        for number in range(1, series + 1):
            of_series = {
                **of_study,
                "SeriesInstanceUID": f"{study_uid}.{number}",
                "FrameOfReferenceUID": f"{study_uid}.9",
                "SeriesNumber": str(number),
                "SeriesDescription": f"SERIES {number}",
                "BodyPartExamined": "CHEST",
                "ProtocolName": "ROUTINE",
                "SliceThickness": "1.25",
                "KVP": "120",
                "RequestAttributesSequence": (
                    f'[{{"RequestedProcedureID":"RP{study:07}","ScheduledProcedureStepID":"SPS{study:07}.{number}"}}]'
                ),
            }
            for n in range(1, count + 1):
                name = f"{chance.getrandbits(128):032x}"
                yield NewInstance(
                    attributes={
                        **of_series,
                        "SOPInstanceUID": f"{study_uid}.{number}.{n}",
                        "InstanceNumber": str(n),
                        "ImagePositionPatient": f"-172.000000\\-156.500000\\{n * 1.25:.6f}",
                        "ImageOrientationPatient": "1.000000\\0.000000\\0.000000\\0.000000\\1.000000\\0.000000",
                        "SliceLocation": f"{n * 1.25:.6f}",
                    },
                    transfer_syntax_uid="1.2.840.10008.1.2.1",
                    file=f"{name[:2]}/{name}.dcm",
                    size=526_000,
                    sha256=name * 2,
                    dataset_sha256=name * 2,
                    association_id=f"fill-{study % 997}",
                )


def fill_index(data_dir: Path, count: int, *, series: int = 2, seed: int = 1) -> int:
    """Make or extend the index in ``data_dir`` by about ``count`` instances; how many it got."""
    per_series = 50
    db = Database(data_dir)
    try:
        catalogue = Catalogue(db)
        added = 0
        made = instances(-(-count // (series * per_series)), series, per_series, seed)
        while batch := list(itertools.islice(made, BATCH)):
            added += len(catalogue.commit(batch, sync=False))
        with db.transaction():  # as if all of it had been looked at: the selector has nothing to do
            db.execute("UPDATE series SET selected_generation = generation")
        db.checkpoint()
    finally:
        db.close()
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="node.data_dir; its index gets the rows")
    parser.add_argument("--count", type=int, default=1_000_000, help="instances, 50 to a series")
    parser.add_argument("--series", type=int, default=2, help="of each study")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    added = fill_index(arguments.data_dir, arguments.count, series=arguments.series, seed=arguments.seed)
    print(f"{added} instances in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
