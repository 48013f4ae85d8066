"""The other end: a reference cloud endpoint in one process, for demos, tests and as the contract for a real one.

It takes what nodes send: DICOM objects by STOW-RS (PS3.18 10.5), records, heartbeats and reports as
``config/cloud-api.yaml`` describes them. It knows nothing of a node's inside: of this package it uses only
the shared modules at the root, and no stage or index is imported here.
"""
