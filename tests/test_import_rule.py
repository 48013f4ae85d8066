"""ARCHITECTURE.md, "One direction": who may import whom. Reads every import, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dicomnode"
STAGES = frozenset(["receive", "select", "infer", "encode", "deliver", "serve", "sync", "custody", "admin"])
COMPOSITION = frozenset(
    [
        *(
            "app",
            "app_shell",
            "app_worker",
            "app_results",
            "cli",
            "cli_cloud",
            "cli_common",
            "cli_conformance",
            "cli_delivery",
            "cli_fleet",
            "cli_jobs",
            "cli_models_import",
            "cli_records",
            "cli_sync",
        ),
        *("__main__", "sidecar", "sidecar_fleet", "doctor", "doctor_cloud", "demo"),
        *("cli_models", "model_desk"),
        *("conformance", "conformance_sections", "conformance_services", "conformance_statuses"),
    ]
)
"""Only these put stages together."""

APART = frozenset(["cloud"])
"""The other end of the line: uses shared modules alone, and nothing but the composition root knows it."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(importing room, imported room) -> why it is right all the same."""


def room_of(path: Path) -> str:
    """First part below the package: a stage, ``index``, ``demo`` or a module at the root."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(source: str, package: tuple[str, ...]) -> set[str]:
    """Rooms of dicomnode that a module imports; ``package`` is where it lies, for relative imports."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {
                tuple(a.value.split(".")) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            }
    return {name[1] for name in found if name[0] == "dicomnode" and len(name) > 1}


def breach(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in EXCEPTIONS or importer in COMPOSITION:
        return False
    if importer in STAGES:
        return imported in STAGES | COMPOSITION | APART
    return imported in STAGES | COMPOSITION | APART | {"index"}  # index and the shared modules at the root


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_direction(path: Path) -> None:
    package = ("dicomnode", *path.relative_to(PACKAGE).parts[:-1])
    imported = imports_of(path.read_text(encoding="utf-8"), package)
    wrong = sorted(other for other in imported if breach(room_of(path), other))
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_every_room_is_known() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders == STAGES | APART | {"index", "dimse", "demo"}, "a new package needs its place in the layer table"


def test_exceptions_are_still_needed() -> None:
    used = {
        (room_of(path), other)
        for path in MODULES
        for other in imports_of(path.read_text(encoding="utf-8"), ("dicomnode", *path.relative_to(PACKAGE).parts[:-1]))
    }
    assert set(EXCEPTIONS) <= used


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("receive", "from dicomnode.index.catalogue import Catalogue", set()),
        ("receive", "from dicomnode.select.rules import rule_matches", {"select"}),
        ("receive", "def f():\n    import dicomnode.deliver.scu", {"deliver"}),
        ("receive", "from ..select import rules", {"select"}),
        ("receive", "from dicomnode import infer, errors", {"infer"}),
        ("deliver", "from dicomnode.app import command", {"app"}),
        ("index", "from dicomnode.receive import ingest", {"receive"}),
        ("errors", "from dicomnode.index.states import JobState", {"index"}),
        ("admin", "import importlib\nimportlib.import_module('dicomnode.sync.stow')", {"sync"}),
        ("app", "from dicomnode.receive import listener", set()),
        ("sync", "from dicomnode.cloud import shapes", {"cloud"}),
        ("cloud", "from dicomnode.index.database import Database", {"index"}),
        ("cloud", "from dicomnode.sync.reply import judge\nfrom dicomnode import durable", {"sync"}),
    ],
)
def test_the_reader_finds_breaches(importer: str, source: str, wrong: set[str]) -> None:
    package = ("dicomnode",) if importer in ("errors", "app") else ("dicomnode", importer)
    assert {other for other in imports_of(source, package) if breach(importer, other)} == wrong
