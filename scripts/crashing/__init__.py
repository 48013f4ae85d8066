"""Proof that nothing acknowledged is lost: kills, power cuts, failing disks, floods. See ``scripts/crash --help``."""
