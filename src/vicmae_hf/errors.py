"""Errors that tell a user what to mend."""


class InputError(ValueError):
    """
    A file, folder, setting or checkpoint that the user gave is wrong. The message names it and says what was expected
    and what to do. The scripts print it as one line, without a traceback.
    """


class MediaDecodingError(ValueError):
    """A video or image cannot be read. The message says which and why. Runs record it and go on."""
