"""The error a user of data_prep sees: one message with value, rule and remedy; exit code 2."""


class PrepError(ValueError):
    """Bad input or configuration; the command line prints the message and exits with 2."""


class Interrupted(Exception):
    """A signal asked the job to stop; what is finished is kept; exit code 75."""
