"""C-FIND, C-MOVE and C-GET over what the index holds (PS3.4 annex C), and MPPS as SCP (annex F)."""

from dicomnode.serve.mpps import ProcedureSteps
from dicomnode.serve.service import QueryRetrieve

__all__ = ["ProcedureSteps", "QueryRetrieve"]
