"""Model bundles: ``models/<name>/<version>/`` with manifest, model, card and golden cases.

Every file is read once, as bytes, and checked against its digest on that read; nothing is
opened by a path that a bundle chose. The bundle's own digest is the SHA-256 of the manifest,
which holds the digests of all the rest.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cmp_to_key
from pathlib import Path

from dicomnode.errors import BundleError
from dicomnode.infer.expansion import check_expansion
from dicomnode.infer.manifest import FILE_NAME, SEMVER, Manifest, parse_manifest
from dicomnode.infer.onnxcheck import check_onnx
from dicomnode.infer.stages.manifest import StagedManifest
from dicomnode.infer.stages.run import provenance
from dicomnode.records import ModelIdentity

MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
ALLOWED_SUFFIXES = frozenset({".onnx", ".npy", ".md", ".txt", ".json"})
MAX_FILE_BYTES = 2 << 30
MAX_FILES = 256


@dataclass(frozen=True, slots=True)
class BundleFolder:
    """A folder that looks like a bundle by its place; nothing in it has been read."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files match their digests. Not yet shown to compute the right thing."""

    path: Path
    manifest: Manifest | StagedManifest
    digest: str

    @property
    def identity(self) -> ModelIdentity:
        """Provenance of its results; ``parameters`` are all steps with all their values."""
        m = self.manifest
        return ModelIdentity(
            name=m.identity.name,
            version=m.identity.version,
            manufacturer=m.identity.manufacturer,
            digest=self.digest,
            device_uid=m.identity.device_uid,
            description=m.identity.description,
            intended_use=m.intended_use,
            licence=m.licence,
            critical=tuple(entry.condition(key) for key, entry in m.outputs.critical.items()),
            parameters=provenance(m)
            if isinstance(m, StagedManifest)
            else {
                "preprocess": [step.model_dump(mode="json") for step in m.preprocess],
                "postprocess": [step.model_dump(mode="json") for step in m.postprocess],
            },
        )

    def read(self, name: str) -> bytes:
        """Bytes of a listed file, checked against its digest on this very read."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise _bad(self.path, f"{name} is not listed in the manifest")
        data = _read_plain(self.path, name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise _bad(self.path, f"{name} does not match its digest", "Fetch the bundle again")
        return data


def load_bundle(path: Path) -> Bundle:
    """Parse and check a bundle folder; raises BundleError naming the file and the remedy.

    Checks: manifest types, name and version against the folder names, exactly the listed
    files, no symlinks, only suffixes of ALLOWED_SUFFIXES, every digest, a model card, and
    an ONNX model that is self-contained.
    """
    data = _read_plain(path, MANIFEST)
    manifest = _parsed(path, data)
    identity = manifest.identity
    if (path.parent.name, path.name) != (identity.name, identity.version):
        raise _bad(
            path,
            f"{MANIFEST} says {identity.name} {identity.version}",
            "Name the folder models/<name>/<version> as the manifest does",
        )
    present = _list_files(path)
    for name in sorted(present - manifest.files.keys() - {MANIFEST}):
        raise _bad(path, f"{name} is not listed in {MANIFEST}", "Remove the file or fetch the bundle again")
    for name in sorted(manifest.files.keys() - present):
        raise _bad(path, f"{name} is missing", "Fetch the bundle again")
    if CARD not in manifest.files or MANIFEST in manifest.files:
        raise _bad(path, f"{MANIFEST} must list {CARD} and not itself", "Correct the manifest")
    bundle = Bundle(path, manifest, hashlib.sha256(data).hexdigest())
    for name in sorted(manifest.files):
        content = bundle.read(name)
        if name.endswith(".onnx"):
            check_onnx(content, name)
            check_expansion(content, name)
    return bundle


def read_manifest(path: Path) -> Manifest | StagedManifest:
    """The manifest of a bundle folder, nothing else checked; raises BundleError."""
    return _parsed(path, _read_plain(path, MANIFEST))


def _parsed(path: Path, data: bytes) -> Manifest | StagedManifest:
    try:
        return parse_manifest(data)
    except BundleError as cause:
        raise BundleError(f"load bundle {path.parent.name}/{path.name}", str(cause), cause.hint) from cause


def find_bundles(models_dir: Path) -> list[BundleFolder]:
    """Bundle folders under ``models_dir``, by name and then from oldest to newest version.

    Only looks at names; one broken bundle does not hide the others.
    """
    found: list[BundleFolder] = []
    if not models_dir.is_dir():
        return found
    for folder in sorted(models_dir.iterdir()):
        if folder.is_dir() and not folder.is_symlink():
            versions = [v.name for v in folder.iterdir() if v.is_dir() and SEMVER.fullmatch(v.name)]
            versions.sort(key=cmp_to_key(compare_versions))
            found += [BundleFolder(folder.name, version, folder / version) for version in versions]
    return found


def compare_versions(a: str, b: str) -> int:
    """Precedence of two semantic versions (semver.org 2.0.0, item 11): negative, 0, positive."""
    first, second = _precedence(a), _precedence(b)
    return (first > second) - (first < second)


def _precedence(version: str) -> tuple[tuple[int, int, int], bool, list[tuple[bool, int, str]]]:
    match = SEMVER.fullmatch(version)
    if not match:
        raise ValueError("not a semantic version")
    major, minor, patch, pre = match.groups()
    parts = [
        (not part.isdigit(), int(part) if part.isdigit() else 0, "" if part.isdigit() else part)
        for part in (pre.split(".") if pre else [])
    ]
    return ((int(major), int(minor), int(patch)), pre is None, parts)


def _list_files(path: Path) -> set[str]:
    names: set[str] = set()
    for base, folders, files in os.walk(path, followlinks=False):
        for entry in (*folders, *files):
            full = Path(base) / entry
            name = full.relative_to(path).as_posix()
            if full.is_symlink():
                raise _bad(path, f"{name} is a symbolic link", "Put the file itself there")
            if entry in folders:
                continue
            if not full.is_file() or full.suffix not in ALLOWED_SUFFIXES or not FILE_NAME.fullmatch(name):
                raise _bad(
                    path,
                    f"{name} is not allowed in a bundle",
                    f"A bundle holds data only: {', '.join(sorted(ALLOWED_SUFFIXES))}",
                )
            names.add(name)
            if len(names) > MAX_FILES:
                raise _bad(path, f"it holds more than {MAX_FILES} files")
    return names


def _read_plain(path: Path, name: str) -> bytes:
    """Bytes of a plain file of bounded size, refusing a symlink at the moment of opening."""
    try:
        descriptor = os.open(path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            # read() makes room for all that it is asked for, so it is asked for what is there.
            data = file.read(min(os.fstat(descriptor).st_size, MAX_FILE_BYTES) + 1)
    except OSError as cause:
        raise _bad(path, f"{name} cannot be read ({cause.strerror})", "Fetch the bundle again") from cause
    if len(data) > MAX_FILE_BYTES:
        raise _bad(path, f"{name} is larger than {MAX_FILE_BYTES} bytes")
    return data


def _bad(path: Path, cause: str, hint: str = "") -> BundleError:
    return BundleError(f"load bundle {path.parent.name}/{path.name}", cause, hint)
