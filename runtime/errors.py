"""The exceptions of all packages, and the exit codes of their commands.

Each exception names the wrong value, the wanted value and, in ``fix``, what the user can do. All of
them can be pickled, so that a pool of processes returns them unchanged.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial
from typing import Any


class ExitCode(IntEnum):
    """The meaning of a command's exit code."""

    DONE = 0
    FAILURE = 1  # any other error: a wrong picture or value, or the device failed
    USAGE = 2  # the parser does not know an option, or refuses its value
    VERIFICATION = 3  # outputs differ from the reference; nothing was written
    MISSING = 4  # a library, a driver or a GPU is missing
    BUNDLE = 5  # a bundle or model file is broken, stale, unsafe or incompatible
    THRESHOLD = 6  # a measurement is worse than the limit that was set
    INTERRUPTED = 130  # Ctrl-C; temporary files are removed


class SdkError(Exception):
    """The base of the exceptions that these packages raise for a problem that a user can fix.

    Parameters
    ----------
    message : what was wrong: the argument, its value, and what was wanted. The attribute
        ``message`` is this text alone; ``str(error)`` contains the fix as well.
    fix : a command to run or a change to make; ``str(error)`` shows it on a line of its own.

    Examples
    --------
    >>> try: Segmenter("kmeans")("no.jpg")
    ... except SdkError as error: print(error.message, error.fix)
    """

    exit_code = ExitCode.FAILURE

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(f"{message}\n  fix: {fix}" if fix else message)
        self.message = message
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how pickle and copy make this error again: from message and fix. An exception's
        own way calls the class with ``str(error)``, so that the fix would become a part of the
        message, and a BundleError would get its default fix as well."""
        return partial(type(self), fix=self.fix), (self.message,), self.__dict__


class InputError(SdkError, ValueError):
    """A picture, an array or an option cannot be used.

    Examples
    --------
    >>> try: Segmenter("kmeans")("no.jpg")
    ... except InputError as error: print(error)
    """


class MissingBackend(SdkError, ImportError):
    """A package, a driver or a device library is not installed.

    Examples
    --------
    >>> try: Segmenter("kmeans", device="cuda")
    ... except MissingBackend as error: print(error.fix)
    """

    exit_code = ExitCode.MISSING


class DeviceError(SdkError, RuntimeError):
    """The device cannot be used, fails, or has too little memory.

    Examples
    --------
    >>> try: Segmenter("kmeans", device="cuda")("street.jpg")
    ... except DeviceError: result = Segmenter("kmeans")("street.jpg")
    """


class BundleError(SdkError, ValueError):
    """A model file or bundle is broken, unsafe or incompatible.

    Examples
    --------
    >>> try: Segmenter("city.bundle")
    ... except BundleError as error: print(error.fix)
    """

    exit_code = ExitCode.BUNDLE

    def __init__(
        self,
        message: str,
        *,
        fix: str = "export it again, or copy it again from a machine where it works",
    ) -> None:
        super().__init__(message, fix=fix)


class EngineMismatch(SdkError, RuntimeError):
    """No engine fits: the engines are for other devices or for other versions of TensorRT, or the
    outputs of an engine differ from the golden vectors.

    Examples
    --------
    >>> try: Segmenter("city.bundle", backend="trt", device="cuda")
    ... except EngineMismatch as error: print(error.fix)
    """

    exit_code = ExitCode.BUNDLE


class VerificationFailed(SdkError, RuntimeError):
    """Outputs differ from the reference by more than the bound; nothing was written."""

    exit_code = ExitCode.VERIFICATION


def first_line(error: BaseException) -> str:
    """Return a short text of an exception.

    Returns
    -------
    The message of an SdkError, without its fix. The reason of an error of the operating system,
    without its number and path. Of any other exception the first line of its text, or the name of
    its type if the text is empty.
    """
    if isinstance(error, SdkError):
        return error.message
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
