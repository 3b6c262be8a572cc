"""The errors that a user can cause, each told apart so that a server or a command can answer them properly."""


class InputError(ValueError):
    """An observation or noise that cannot be used: wrong shape, dtype, missing key, NaN."""


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, incomplete, or not what it says it is."""
