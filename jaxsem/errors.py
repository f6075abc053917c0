"""The errors that jaxsem raises for what a user can mend: each message is one sentence with the values seen and the way out."""


class JaxsemError(Exception):
    """Base of every error that jaxsem raises on purpose; the command line prints it without a traceback and exits with 2."""


class InputError(JaxsemError, ValueError):
    """An argument, option, image or data set that cannot be used as given."""


class FormatError(JaxsemError, ValueError):
    """A file or packet that is damaged, cut short, foreign, or from a newer version of the format."""


class WeightsError(JaxsemError, ValueError):
    """Parameters that do not fit the model: missing, surplus or misshapen keys, or another digest than the file asks for."""


class OutputError(JaxsemError, OSError):
    """A result that could not be written: the disk is full, the path is not writable, or the file exists already."""
