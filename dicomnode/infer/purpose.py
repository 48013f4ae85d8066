"""What a bundle is for: studies, or measurements of speed alone.

A bundle whose manifest says ``purpose = "benchmark"`` may hold random weights. It is opened,
verified and timed like any other, and refused wherever its results could reach a patient's
study: by check-config, by the model desk, by the worker and by every place of inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dicomnode.errors import BundleError
from dicomnode.findings import Finding, Level
from dicomnode.infer.bundle import MANIFEST, BundleFolder, read_manifest
from dicomnode.infer.manifest import Manifest
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.settings import Settings

HINT = "Name a model that is made for studies; benchmarks are run by scripts/bench --inference"


def check_clinical(manifest: Manifest | StagedManifest) -> None:
    """Raises BundleError when the bundle must not analyse studies. Pure."""
    if manifest.purpose != "clinical":
        identity = manifest.identity
        raise BundleError(f"use {identity.name} {identity.version} for studies", "it is for benchmarks only", HINT)


def check_clinical_at(path: Path) -> None:
    """:func:`check_clinical` of a bundle folder, from its manifest alone; raises BundleError as loading does."""
    check_clinical(read_manifest(path))


def check_clinical_version(folders: Sequence[BundleFolder], name: str, version: str) -> None:
    """:func:`check_clinical_at` of a version where it is on this box."""
    for folder in folders:
        if (folder.name, folder.version) == (name, version):
            check_clinical_at(folder.path)


def rule_findings(settings: Settings) -> Iterator[Finding]:
    """A fault for each rule that names a bundle for benchmarks; what is missing or broken is doctor's to tell."""
    from dicomnode.infer.serving import bundle_folders, resolve

    folders = bundle_folders(settings.inference.models_dir, settings.node.data_dir)
    for rule in settings.rules:
        for reference in rule.every_model:
            try:
                manifest = read_manifest(resolve(folders, reference, {}).path)
            except BundleError:
                continue
            try:
                check_clinical(manifest)
            except BundleError as error:
                text = f"{rule.name}: {reference}: {error.cause} ({MANIFEST} says purpose = benchmark)"
                yield Finding(Level.fault, "rules", text, error.hint)
