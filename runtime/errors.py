"""The errors of all packages, and the exit codes of their commands.

Each error says what came, what was wanted and, in ``fix``, what to do.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    FAILURE = 1
    USAGE = 2  # an option or a value that the command does not know
    VERIFICATION = 3  # an artifact differs from the reference; nothing was written
    MISSING = 4  # a library, a driver or a GPU
    BUNDLE = 5  # a bundle or model file is broken, stale, unsafe or incompatible
    THRESHOLD = 6  # a measurement is worse than the limit that was set
    INTERRUPTED = 130  # by Ctrl-C; temporary files are removed


class SdkError(Exception):
    """Base of every error raised on purpose.

    Parameters
    ----------
    message : what was wrong: the argument, what came, what was wanted. The attribute ``message``
        is this text alone; ``str(error)`` has the fix as well.
    fix : a command to run or a change to make; shown on a line of its own.
    """

    exit_code = ExitCode.FAILURE

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(f"{message}\n  fix: {fix}" if fix else message)
        self.message = message
        self.fix = fix


class InputError(SdkError, ValueError):
    """A picture, an array or an option that cannot be used."""


class MissingBackend(SdkError, ImportError):
    """A package, a driver or a device library that is not installed."""

    exit_code = ExitCode.MISSING


class DeviceError(SdkError, RuntimeError):
    """The device refused, failed or ran out of memory."""


class BundleError(SdkError, ValueError):
    """A model file or bundle that is broken, unsafe or incompatible."""

    exit_code = ExitCode.BUNDLE

    def __init__(
        self, message: str, *, fix: str = "export it again, or copy it again from where it works"
    ) -> None:
        super().__init__(message, fix=fix)


class EngineMismatch(SdkError, RuntimeError):
    """An engine that was built for another device or another version."""

    exit_code = ExitCode.BUNDLE


class VerificationFailed(SdkError, RuntimeError):
    """An artifact whose outputs differ from the reference; it was not written."""

    exit_code = ExitCode.VERIFICATION


def first_line(error: BaseException) -> str:
    """The message of one of our errors, without its fix; of any other error the first line of its
    text, or its type's name where it has no text."""
    if isinstance(error, SdkError):
        return error.message
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
