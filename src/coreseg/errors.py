"""Every error this package raises on purpose.

    CoreSegError            anything a user can mend; the command line prints it as one line and exits with 2
    ├── InputError          an image, mask or question that cannot be used
    ├── DataError           a data set, or a row of one, that breaks the on-disk contract
    ├── ModelError          a checkpoint that is missing, incomplete or not a CORE-Seg
    ├── ConfigError         a setting that is unknown, of the wrong type or out of range
    ├── TrainingError       a run whose numbers went bad, so that going on would spoil the model
    ├── TeacherError        a teacher or judge that cannot be reached, refuses, or has used up its budget
    └── MissingExtraError   an optional dependency that is not installed

A malformed answer of a model is none of these: it is a recorded result (see `coreseg.answer.parse`).
"""


class CoreSegError(Exception):
    """Base of the tree. The message says what came, what was expected and what to do next."""


class InputError(CoreSegError):
    """An image, mask or question cannot be used."""


class DataError(CoreSegError):
    """A data set, or one row of it, breaks the on-disk contract."""


class ModelError(CoreSegError):
    """A checkpoint is missing, incomplete, or not what was asked for."""


class ConfigError(CoreSegError):
    """A configuration value is unknown, of the wrong type, or out of range."""


class TrainingError(CoreSegError):
    """A training run's loss is not a number any more; its last checkpoint is still good."""


class TeacherError(CoreSegError):
    """A teacher or judge does not answer any more, or its budget is used up; the replies received so far are kept."""


class MissingExtraError(CoreSegError):
    """An optional dependency is needed; the message gives the `pip install` that brings it."""
