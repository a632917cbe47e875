"""Errors that tell a user what to fix."""


class InputError(ValueError):
    """
    A file, folder, setting or checkpoint that the user gave is wrong. The message names it and says what was expected
    and what to do. The scripts print it as one line, without a traceback.
    """


class MediaDecodingError(ValueError):
    """A video or image cannot be read. The message says which and why. Runs record it and continue."""


class NonFiniteError(RuntimeError):
    """
    A loss, gradient or weight became infinite or NaN. The message says where.

    Args:
        step: the update, counted from 1; None if that is not known.
        losses: its losses, and the norm of its gradient.

    Attributes:
        samples: names of its samples.
    """

    def __init__(self, message: str, step: int | None = None, losses: dict[str, float] | None = None):
        super().__init__(message)
        self.step = step
        self.losses = losses or {}
        self.samples: list[str] = []
