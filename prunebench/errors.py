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
