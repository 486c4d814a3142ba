"""The errors of all packages. Each says what came, what was wanted and, in ``fix``, what to do."""

from __future__ import annotations


class SdkError(Exception):
    """Base of every error raised on purpose.

    Parameters
    ----------
    message : what was wrong: the argument, what came, what was wanted.
    fix : a command to run or a change to make; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(f"{message}\n  fix: {fix}" if fix else message)
        self.fix = fix


class InputError(SdkError, ValueError):
    """A picture, an array or an option that cannot be used."""


class MissingBackend(SdkError, ImportError):
    """A package, a driver or a device library that is not installed."""

    exit_code = 4


class DeviceError(SdkError, RuntimeError):
    """The device refused, failed or ran out of memory."""


class BundleError(SdkError, ValueError):
    """A model file or bundle that is broken, unsafe or incompatible."""

    exit_code = 5

    def __init__(
        self, message: str, *, fix: str = "export it again, or copy it again from where it works"
    ) -> None:
        super().__init__(message, fix=fix)


class EngineMismatch(SdkError, RuntimeError):
    """An engine that was built for another device or another version."""

    exit_code = 5


class VerificationFailed(SdkError, RuntimeError):
    """An artifact whose outputs differ from the reference; it was not written."""

    exit_code = 3
