"""The two kinds of failure the suite tells apart."""


class UserError(Exception):
    """Something the user can mend; the message names it and says how. Stops the command."""


class CellError(Exception):
    """A method or a training run broke its own cell (contract, target, NaN). Shown on its row.

    `inherited` is the failure of an earlier stage that this one passes on.
    """

    def __init__(self, message: str, inherited: dict | None = None):
        super().__init__(message)
        self.inherited = inherited


def short_of_memory(error: BaseException) -> bool:
    """Whether memory was short, in any of the words that torch has for it."""
    import torch

    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    # What cuDNN and cuBLAS say when there is no room for their workspaces.
    words += ("unable to find an engine", "valid cuDNN algorithm", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def machine_fault(error: BaseException) -> bool:
    """Whether the machine failed, not the cell: short memory, or a GPU that is lost or broken."""
    import torch

    broken = isinstance(error, torch.AcceleratorError) and "device-side assert" not in str(error)
    return broken or short_of_memory(error)
