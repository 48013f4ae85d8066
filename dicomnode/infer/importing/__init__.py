"""Bundles of others turned into bundles of ours. Their code is never run: configuration is read as data."""
