"""Errors a user of the library can meet. All derive from `ChaiError`."""


class ChaiError(Exception):
    """Base of every error the library raises on purpose; its text says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; without any, the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class LoadError(ChaiError):
    """A model cannot be loaded."""


class ChaiWarning(UserWarning):
    """What a person should know, though the work goes on."""


class ProfileError(ChaiError):
    """A cluster profile is malformed, or does not belong to the model."""


class CalibrationError(ChaiError):
    """Calibration cannot be done with the given text or options."""


class EvaluationError(ChaiError):
    """An evaluation cannot be run as asked."""


class UnsupportedModelError(ChaiError):
    """The model, or a feature of its attention, cannot run with clustered heads."""


class CacheError(ChaiError):
    """A K,V cache was used in a way that clustered heads cannot honour."""


class AttentionInputError(ChaiError, ValueError):
    """Tensors with a shape, dtype, layout or device that attention cannot run with."""


class FileError(ChaiError):
    """A file or folder cannot be read or written where it was asked for."""
