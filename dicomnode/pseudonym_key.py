"""The key file of the pseudonyms: 32 random bytes, readable by the node's user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dicomnode import durable
from dicomnode.errors import OperatorError
from dicomnode.pseudonyms import KEY_BYTES
from dicomnode.settings import Settings

_OPERATION = "read the pseudonym key"


def key_path(settings: Settings) -> Path:
    return settings.cloud.pseudonym_key_file or settings.node.data_dir / "cloud-pseudonyms.key"


def read_key(settings: Settings) -> bytes:
    """Raises OperatorError when it is absent, too short, or readable by others."""
    path = key_path(settings)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        key = path.read_bytes()[:4096]
    except OSError as error:
        hint = "Restore it from a backup: with another key the cloud would see other patients"
        raise OperatorError(_OPERATION, f"{path}: {error.strerror}", hint) from None
    if mode & 0o077:
        raise OperatorError(_OPERATION, f"others on this box may use {path} (mode {mode:o})", f"chmod 600 {path}")
    if len(key) < KEY_BYTES:
        raise OperatorError(_OPERATION, f"{path} holds fewer than {KEY_BYTES} bytes", "Restore it from a backup")
    return key


def ensure_key(settings: Settings, *, used: bool) -> bytes:
    """The key, made where there is none and none was ``used`` before."""
    path = key_path(settings)
    if not path.exists() and not used and settings.cloud.pseudonym_key_file is None:
        durable.write_durable(path, os.urandom(KEY_BYTES))
    return read_key(settings)
