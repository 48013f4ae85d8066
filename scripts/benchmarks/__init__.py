"""The measurements of ``scripts/bench``: one module for each section, peers and clients beside them.

Everything runs on loopback in temporary folders. A measurement counts only when the acceptor
holds every object that was sent, so a fast failure is never a result.
"""
