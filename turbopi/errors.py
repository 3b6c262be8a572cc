"""Errors that are told apart, so that a server or a command can answer them properly. Most of them a user can cause."""


class InputError(ValueError):
    """An observation or noise that cannot be used: wrong shape, dtype, missing key, NaN."""


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, incomplete, or not what it says it is."""


class NonFiniteActionsError(RuntimeError):
    """The model computed NaN or infinite actions, which no robot should be sent."""
