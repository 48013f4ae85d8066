"""The recorder that these tests put under a node: built once, from C."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.crashing.shim import NoCompiler, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built shim; skips the test without a C compiler, fails it where CI is true."""
    try:
        return build(tmp_path_factory.mktemp("shim"))
    except NoCompiler as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}, and CI must have it")
        pytest.skip(str(error))
