"""The encode stage as the worker needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dicomnode import __version__
from dicomnode.clock import iso
from dicomnode.errors import UnsuitableSeries
from dicomnode.identity import derived_uid, failure_identity
from dicomnode.index.corrections import corrected_study
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.orders import Order
from dicomnode.records import Analysis, EncodedObject, ModelIdentity, ResultIdentity, SourceInstance
from dicomnode.settings import Settings

MANUFACTURER = "dicomnode"


def encoder(
    settings: Settings, decoder: Any = None, db: Database | None = None
) -> Callable[..., Sequence[EncodedObject]]:
    """The encode stage as the worker needs it; ``decoder`` reads pixels in a process that may die.

    ``db``: where corrections are looked up, if the site has them applied.
    """
    from dicomnode.encode import encode_results

    station = _station(settings)
    options: dict[str, Any] = {} if decoder is None else {"pixels": partial(_pixels, decoder)}

    def encode(
        analysis: Analysis,
        identity: ResultIdentity,
        model: ModelIdentity,
        sources: Sequence[SourceInstance],
        order: Order,
    ) -> Sequence[EncodedObject]:
        correction = _correction(settings, db, sources)
        return encode_results(
            analysis, identity, model, sources, station=station, order=order, correction=correction, **options
        )

    return encode


def warm_encoder(settings: Settings) -> None:
    """The libraries load their tables now, not with the first result."""
    from dicomnode.encode.warm import warm_up

    warm_up(_station(settings))


def _station(settings: Settings) -> Any:
    from dicomnode.encode import Station

    return Station(
        manufacturer=MANUFACTURER,
        model_name="DICOM AI node",
        software_versions=__version__,
        serial_number=settings.node.ae_title,
        institution=settings.node.institution,
    )


def _correction(settings: Settings, db: Database | None, sources: Sequence[SourceInstance]) -> Any:
    """What serves otherwise than the images say; None where nothing does, or the site does not want it."""
    if db is None or not settings.sync.apply_corrections or not sources:
        return None
    from dicomnode.encode import Correction

    found = corrected_study(db, sources[0].sop_instance_uid)
    return None if found is None else Correction(found.values, found.changed_time, settings.node.ae_title)


def _pixels(decoder: Any, source: SourceInstance, frame: int, rows: int, columns: int) -> Any:
    """Stored values of one image or frame, by the decoder of the infer stage."""
    from dicomnode.infer.decode import Undecodable
    from dicomnode.infer.multiframe import single_frames

    try:
        data = source.path.read_bytes()
        if frame:
            (data,) = single_frames(data, [frame])
        (values,) = decoder.frames([(data, rows, columns)])
    except Undecodable as cause:
        raise UnsuitableSeries("make key image", cause.code, cause.text) from cause
    except OSError as error:
        raise UnsuitableSeries("make key image", "NO_FILE", f"unreadable ({error.strerror})") from error
    return values


def failure_reporter(settings: Settings, db: Database) -> Callable[..., EncodedObject]:
    """SR about a job that failed or was refused; its UIDs derive from the job's work and the reason."""
    from dicomnode.encode import Failure, encode_failure

    station = _station(settings)
    jobs = Jobs(db)

    def report(job: Row, sources: Sequence[SourceInstance], model: ModelIdentity | None) -> EncodedObject:
        refused, reason = job["state"] == "refused", str(job["last_error"] or "unknown")
        name, _, version = str(job["model"]).partition("@")
        named = model or ModelIdentity(
            name, version or "unknown", MANUFACTURER, "unknown", derived_uid("model", str(job["model"]))
        )
        before = jobs.predecessor(job)
        identity = failure_identity(
            inputs=str(job["inputs_sha256"]),
            model=str(job["model"]),
            revision=int(job["revision"]),
            reason=reason.partition(":")[0] if refused else "failed",
            content_datetime=iso(db.clock.wall()),
            predecessor_sr=(
                before["StudyInstanceUID"], before["SeriesInstanceUID"], before["SOPClassUID"], before["SOPInstanceUID"]
            ) if before else None,
        )  # fmt: skip
        failure = Failure(refused, reason, int(job["attempts"]))
        correction = _correction(settings, db, sources)
        return encode_failure(failure, identity, named, sources, station=station, correction=correction)

    return report
