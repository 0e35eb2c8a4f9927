"""The base of everything that is read from a file and typed: settings of tracks, and records."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen section: no unknown keys, no value that has to be converted, no NaN, no infinity.

    "8" is no number, 1 no boolean and 3.0 no integer; 1 is a real number all the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class WrongKeyError(ValueError):
    """Raised by a check of a section: `key`, dotted and below the section, is what is wrong."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key
