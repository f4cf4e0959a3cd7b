"""What the command line says when it cannot do what it was asked."""


class UsageError(Exception):
    """One line for the person at the terminal; the program ends with exit code 2."""


class StartError(Exception):
    """What was started did not come up; one line says why, exit code 1."""


class OperationError(Exception):
    """What was asked of a running server was not done; one line says why, exit code 1."""
