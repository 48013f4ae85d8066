"""One error tree, split by who can act: the peer, the operator, or us.

Every error names the operation, its cause, a hint for the person who can act, and whether
trying again can help. No message may carry patient data: callers pass keywords, counts,
our own ids and peer names, never attribute values.
"""

from __future__ import annotations


class NodeError(Exception):
    """Base of every error that the node raises on purpose."""

    retryable: bool = False

    def __init__(self, operation: str, cause: str, hint: str = "", *, retryable: bool | None = None) -> None:
        self.operation = operation
        self.cause = cause
        self.hint = hint
        if retryable is not None:
            self.retryable = retryable
        super().__init__(operation, cause, hint)

    def __str__(self) -> str:
        text = f"{self.operation}: {self.cause}"
        return f"{text}. {self.hint}" if self.hint else text


class PeerError(NodeError):
    """The remote side has to act: it sent something wrong or refused something."""


class PeerAway(PeerError):
    """The peer cannot be reached or answered that it is busy; this passes."""

    retryable = True


class PeerRefused(PeerError):
    """The peer refused for good; trying the same again cannot help."""


class OperatorError(NodeError):
    """The operator of this node has to act: configuration, disk, models."""


class SettingsError(OperatorError):
    """A setting is wrong: names the key, what is wrong and what would be right."""


class StorageError(OperatorError):
    """The disk refused: full, read-only or broken."""


class DiskFull(StorageError):
    """Free space is at or below the reserve; intake is refused until there is room."""

    retryable = True


class BundleError(OperatorError):
    """A model bundle is not what its manifest says, or fails its golden case."""


class EngineError(OperatorError):
    """An inference engine cannot serve on this box.

    ``code`` is one of the rejection codes of the engine contract, for example
    ``LIB_MISSING``, ``PROVIDER_MISSING`` or ``GOLDEN_MISMATCH``.
    """

    def __init__(self, operation: str, code: str, cause: str, hint: str = "") -> None:
        self.code = code
        super().__init__(operation, f"{code}: {cause}", hint)


class DeviceLost(OperatorError):
    """The accelerator fails every call from now on in this process: it ends once its lease was handed back."""

    retryable = True


class DeviceFull(OperatorError):
    """The accelerator has too little memory for this work, and no other engine does it; that may pass."""

    retryable = True


class InputError(NodeError):
    """The data set itself is the reason; the same input fails the same way each time."""


class MalformedDataSet(InputError):
    """The bytes are not a data set within the limits of the header reader (PS3.5)."""


class UnsuitableSeries(InputError):
    """The series does not meet the model's input contract; says why in plain words.

    ``code`` is a short stable word such as ``GAP`` or ``MIXED_ORIENTATION``.
    """

    def __init__(self, operation: str, code: str, cause: str, hint: str = "") -> None:
        self.code = code
        super().__init__(operation, cause, hint)


class IllegalTransition(NodeError):
    """A state change that the state table does not know: a mistake in this program."""


class LeaseLost(NodeError):
    """Another process took over this piece of work; drop the result, it is being redone."""
