"""What can go wrong, as types: the command line turns each into one line and an exit code."""


class CryodrgnPipelineError(Exception):
    """Base of all errors this package raises on purpose; the exit code is the class's own."""

    exit_code = 1


class ConfigError(CryodrgnPipelineError):
    """An option or a line of config.yaml cannot be used as given."""

    exit_code = 2


class InputFormatError(CryodrgnPipelineError):
    """A user's file lacks something, contradicts itself or is damaged."""

    exit_code = 3


class ConventionError(CryodrgnPipelineError):
    """The data disagree with the angle, shift, contrast or scale conventions in force."""

    exit_code = 3


class TrainingError(CryodrgnPipelineError):
    """Training cannot go on: the loss is not a number, or a checkpoint does not fit."""


class LostRankError(CryodrgnPipelineError):
    """Another of the processes that compute together is gone; what that one says is the reason."""

    exit_code = 4  # the process that started them looks for the one that ended otherwise


class ExternalJobError(CryodrgnPipelineError):
    """A host program's job could not be read, filled or closed."""


class Interrupted(BaseException):
    """A signal asked the program to stop; like Ctrl-C it is no error, and no `except Exception` holds it up.

    Parameters
    ----------
    signal_number
        SIGTERM or SIGINT.
    saved
        What the same command will go on from, in words; empty: it starts over.
    """

    def __init__(self, signal_number: int, saved: str = "") -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number, self.saved = signal_number, saved

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, as shells count."""
        return 128 + self.signal_number
