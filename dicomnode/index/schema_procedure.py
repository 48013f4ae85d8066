"""Tables of performed procedure steps and notifications, as m0007 makes them; see :mod:`dicomnode.index.procedure`."""

from __future__ import annotations

from sqlite_utils import Database


def create_procedure_steps(db: Database) -> None:
    """What modalities say of their steps, the series and instances that those list, and who is told of results."""
    db["procedure_steps"].create(
        {
            "id": int,
            "SOPInstanceUID": str,
            "peer": str,
            "state": str,
            "Modality": str,
            "wrong_entry": int,
            "version": int,
            "attributes": bytes,
            "created_at": float,
            "created_time": str,
            "changed_at": float,
            "changed_time": str,
        },
        pk="id",
        not_null={"SOPInstanceUID", "state", "version", "attributes"},
        defaults={"wrong_entry": 0},
    )
    db["procedure_steps"].create_index(["SOPInstanceUID"], unique=True)
    db["procedure_step_studies"].create(
        {"step_id": int, "StudyInstanceUID": str},
        pk=("step_id", "StudyInstanceUID"),
        foreign_keys=[("step_id", "procedure_steps", "id")],
    )
    db["procedure_step_studies"].create_index(["StudyInstanceUID"])
    db["performed_series"].create(
        {"id": int, "step_id": int, "SeriesInstanceUID": str, "instances": int},
        pk="id",
        foreign_keys=[("step_id", "procedure_steps", "id")],
    )
    db["performed_series"].create_index(["step_id", "SeriesInstanceUID"], unique=True)
    db["performed_series"].create_index(["SeriesInstanceUID"])
    db["performed_instances"].create(
        {"performed_series_id": int, "SOPInstanceUID": str},
        pk=("performed_series_id", "SOPInstanceUID"),
        foreign_keys=[("performed_series_id", "performed_series", "id")],
    )
    db["jobs"].add_column("notify", str)
    db["notifications"].create(
        {
            "id": int,
            "job_id": int,
            "study_id": int,
            "destination": str,
            "retrieve_from": str,
            "SOPInstanceUID": str,
            "results": str,
            "state": str,
            "attempts": int,
            "next_at": float,
            "lease_owner": str,
            "lease_until": float,
            "last_error": str,
            "created_at": float,
            "created_time": str,
            "finished_at": float,
            "finished_time": str,
        },
        pk="id",
        foreign_keys=[("job_id", "jobs", "id"), ("study_id", "studies", "id")],
        not_null={"job_id", "destination", "retrieve_from", "state"},
        defaults={"attempts": 0, "next_at": 0.0},
    )
    db["notifications"].create_index(["job_id", "destination", "retrieve_from"], unique=True)
    db["notifications"].create_index(["state", "destination"])
