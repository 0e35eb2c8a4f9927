"""The two kinds of failure the suite tells apart."""


class UserError(Exception):
    """Something the user can mend; the message names it and says how. Stops the command."""


class CellError(Exception):
    """A method or a training run broke its own cell (contract, target, NaN). Shown on its row."""
