"""C-FIND, C-MOVE and C-GET over what the index holds (PS3.4 annex C), MPPS as SCP (F), storage commitment (J)."""

from dicomnode.serve.commitment import Commitment
from dicomnode.serve.mpps import ProcedureSteps
from dicomnode.serve.service import QueryRetrieve

__all__ = ["Commitment", "ProcedureSteps", "QueryRetrieve"]
