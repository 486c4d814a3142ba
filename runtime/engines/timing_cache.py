"""TensorRT's timing cache: a file with the measured times of kernels, so that the next build does
not measure them again."""

from __future__ import annotations

from pathlib import Path

from runtime.engines.named_files import read_regular, shell_word
from runtime.errors import InputError
from runtime.files import file_error, replace_file, shown, stat_of, temporary_name, write_new

_OTHER = "name another file with --timing-cache, or leave the option out"


class TimingCache:
    """The timing cache in a file, which need not exist yet.

    The constructor checks that the file can be read and written, because a build takes minutes.

    Parameters
    ----------
    path : the file; None for no cache at all.

    Attributes
    ----------
    times : the bytes for the builder: those of the file, b"" for a new file, None for no cache.

    Raises
    ------
    InputError : the file cannot be read, or its folder cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.times: bytes | None = None
        if path is None:
            return
        try:
            exists = stat_of(path) is not None
            self.times = read_regular(path, "a file") if exists else b""
        except InputError as error:
            raise InputError(f"timing cache {error.message}", fix=_OTHER) from error
        if stat_of(path.parent) is None:
            folder = shell_word(str(path.parent))
            raise InputError(f"timing cache {shown(path)} has no folder", fix=f"mkdir -p {folder}")
        trial = temporary_name(path)
        try:
            write_new(trial, b"", durable=False)
            trial.unlink()
        except OSError as error:
            raise self._unwritable(path, error) from error

    def write(self, times: bytes | None) -> None:
        """Replace the contents of the file.

        Parameters
        ----------
        times : the bytes that the builder returned after a build; None leaves the file unchanged.

        Raises
        ------
        InputError : the file cannot be written; its old contents remain.
        """
        if self.path is None or times is None:
            return
        self.times = times
        try:
            replace_file(self.path, times)
        except OSError as error:
            raise self._unwritable(self.path, error) from error

    @staticmethod
    def _unwritable(path: Path, error: OSError) -> InputError:
        problem = file_error("written", path, error)
        return InputError(f"timing cache {problem.message}", fix=f"{problem.fix}; or {_OTHER}")
