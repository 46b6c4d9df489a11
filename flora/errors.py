"""Errors that a user can mend: each message is one line that says what is wrong and what to do (exit code 2)."""


class FloraError(Exception):
    """Base of the errors below; ``train.py`` prints the message after ``error: `` and exits with code 2."""


class ConfigError(FloraError):
    """A setting that cannot be used: an unknown name, a value out of range, settings that contradict each other."""


class TrainingDiverged(FloraError):
    """The training loss became NaN or infinite; the run fails with exit code 3 and leaves a failed record."""


class DataError(FloraError):
    """Missing, unreadable or inconsistent data."""


class WeightsError(FloraError):
    """Pretrained weights that are missing, unreachable or do not match their checksum."""
