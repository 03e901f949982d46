"""Errors that a user can act on.

Every one is a single line that names what was wrong, the value it had and what is
allowed; the command line turns the two kinds into its two exit codes.
"""


class RequestError(ValueError):
    """The request was wrong: nothing has been started. The command line exits with 2."""


class ConfigError(RequestError):
    """One setting is wrong.

    Args:
        key: the full dotted key, as one would write it in an override.
        value: the value that was given.
        allowed: what would have been accepted, in words.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"{key} = {value!r}: {allowed}")

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.allowed)


class RunError(RuntimeError):
    """A run that had started could not go on. The command line exits with 1."""


class InfrastructureError(RunError):
    """What a run depends on failed: its disk, a node, the cluster. The run is not at fault and can go on later."""


def one_line(said: object) -> str:
    """What an error, or its message, says on one line; an error's type where it says nothing."""
    return " ".join(str(said).split()) or type(said).__name__
