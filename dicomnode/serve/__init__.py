"""Query and retrieve: C-FIND, C-MOVE and C-GET over what the index holds (PS3.4 annex C)."""

from dicomnode.serve.service import QueryRetrieve

__all__ = ["QueryRetrieve"]
