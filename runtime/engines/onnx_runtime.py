"""How these packages use the library ONNX Runtime: its import without telemetry, its sessions in
forked processes, and the first run of a network, which ends at a deadline."""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakSet

from runtime.errors import DeviceError, InputError, MissingBackend
from runtime.flavours import check_version, import_fix

LOG = logging.getLogger("dg.onnx")
TELEMETRY = "ORT_DISABLE_TELEMETRY"  # ONNX Runtime reads this variable when it is imported
DEADLINE = 60.0  # seconds for the first run of a network, unless SEG_DEADLINE_S is set
GRACE = 5.0  # seconds in which a run ends after it was told to; it ends after an operator

Answer = TypeVar("Answer")


def telemetry_off() -> None:
    """Switch the telemetry of ONNX Runtime off, unless the environment variable
    ``ORT_DISABLE_TELEMETRY`` is set, to 0 or to another value. An empty value counts as unset.

    The variable is set to 1. It works for this process, if ONNX Runtime is not imported yet, and
    for the processes that it starts. If ONNX Runtime is imported already, its events are switched
    off, and one line is logged to "dg.onnx".

    Example
    -------
    >>> telemetry_off()
    >>> import onnxslim  # imports ONNX Runtime
    """
    if os.environ.get(TELEMETRY):
        return
    os.environ[TELEMETRY] = "1"
    library = sys.modules.get("onnxruntime")
    if hasattr(library, "disable_telemetry_events"):
        library.disable_telemetry_events()  # type: ignore[union-attr]
        LOG.info(
            "ONNX Runtime was imported before its telemetry was switched off; its events are off "
            "from now on. Set %s=1 before the import to avoid its thread and files.",
            TELEMETRY,
        )


def import_onnxruntime(use: str) -> Any:
    """Import ONNX Runtime, with its telemetry off as :func:`telemetry_off` says.

    Parameters
    ----------
    use : what ONNX Runtime is needed for, for the message: "run prior.onnx".

    Returns
    -------
    The module ``onnxruntime``.

    Raises
    ------
    MissingBackend : ONNX Runtime is not installed, or cannot be imported.

    Example
    -------
    >>> import_onnxruntime("run prior.onnx").__version__
    '1.31.1'
    """
    telemetry_off()
    try:
        import onnxruntime
    except (ImportError, AttributeError) as error:  # AttributeError: the files of two flavours
        raise MissingBackend(
            f"ONNX Runtime is needed to {use}, but {error}", fix=import_fix("onnxruntime", error)
        ) from error
    check_version("onnxruntime", onnxruntime)
    return onnxruntime


# A forked process has the session objects of its parent, but not the threads of the sessions. The
# destructor of a session waits for its threads, in the child for ever. So in a child each inherited
# session gets a reference that is never released.
_OPEN: WeakSet[Any] = WeakSet()


def outlive_fork(thing: Any) -> None:
    """Make sure that no forked process destroys ``thing``, a session or a holder of GPU memory.

    This process destroys it as usual: only a weak reference to it is stored.
    """
    _OPEN.add(thing)


def _keep_inherited() -> None:
    """Add a reference to each session that the parent process made."""
    for thing in list(_OPEN):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_keep_inherited)


def default_deadline() -> float | None:
    """Return the seconds for the first run of a network: the value of the environment variable
    ``SEG_DEADLINE_S``, or 60 if it is unset or empty; None for 0, which means no limit.

    Raises
    ------
    InputError : the value is no finite number of 0 or more.
    """
    text = os.environ.get("SEG_DEADLINE_S") or str(DEADLINE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(
            f"the environment variable SEG_DEADLINE_S is {text!r}; wanted seconds for the first "
            "run of a network",
            fix="SEG_DEADLINE_S=300, or 0 for no limit",
        )
    return seconds or None


class Runner:
    """Runs one session. It refuses to run in a forked process, and ends the first run at a
    deadline, or when the network is closed. Several threads may use it at a time.

    The first run is made by a thread of its own, so that Ctrl-C, the deadline and the exit of the
    interpreter can end a network that loops endlessly. When a first run has ended well, the
    caller's thread makes all later runs, without a deadline and without this cost. A network that
    loops endlessly only in a later run is not noticed.

    Parameters
    ----------
    name : of the network, for messages.
    deadline_s : seconds for the first run; None for no limit. Ctrl-C ends the first run in both
        cases. The attribute can be changed until the first run. After a first run that was ended at
        the deadline, each run raises the same error at once.
    turn : a lock that is held during each run; None for no lock.

    Example
    -------
    >>> runner = Runner("prior.onnx", 60.0)
    >>> runner(lambda *options: session.run(None, feed, *options))
    """

    def __init__(
        self,
        name: str,
        deadline_s: float | None,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.name, self.deadline_s = name, deadline_s
        self._turn = turn or nullcontext()
        self._process = os.getpid()
        self._first, self._has_run = threading.Lock(), False
        self._late_s: float | None = None  # the deadline that ended the first run
        self._closed, self._options = False, None  # the RunOptions of the first run

    def close(self) -> None:
        """End a first run that is in progress, after the operator that it computes. This run and
        all later ones raise an InputError. A later run that is in progress is not ended."""
        self._closed = True
        if self._options is not None:
            self._options.terminate = True

    def check_usable(self) -> None:
        """Check that the session can run.

        Raises
        ------
        InputError : this process was forked from the one that made the session, or :meth:`close`
            was called.
        DeviceError : the first run did not end before the deadline.
        """
        if os.getpid() != self._process:
            raise InputError(
                f"{self.name} was loaded in process {self._process}, and process {os.getpid()} is "
                "a fork of it; the threads of ONNX Runtime do not exist in a fork",
                fix="load the network after the fork, in the process that uses it (gunicorn: no "
                "--preload, or load in post_fork)",
            )
        if self._closed:
            raise InputError(f"{self.name} is closed", fix="load it again")
        if self._late_s is not None:
            raise DeviceError(
                f"the first run of {self.name} did not end within {self._late_s:g} s: it loops "
                "endlessly, or this device is too slow for it",
                fix="load it again with a smaller imgsz or a longer deadline: SEG_DEADLINE_S=300, "
                "or 0 for no limit, in the environment; deadline_s in Python; see "
                "docs/onnx_runtime.md",
            )

    def __call__(self, run: Callable[..., Answer]) -> Answer:
        """Return the result of ``run``.

        Parameters
        ----------
        run : is called with an onnxruntime.RunOptions for the first run, and without arguments for
            later runs. It passes its arguments to the session.

        Raises
        ------
        InputError : this process is a fork of the one that made the session, or the network is
            closed.
        DeviceError : the first run, this one or an earlier one, did not end before the deadline.
        Exception : all that ``run`` raises.
        """
        self.check_usable()
        if not self._has_run:
            with self._first:  # other threads wait, and their runs are no first runs
                self.check_usable()
                if not self._has_run:
                    answer = self._run_first(run)
                    self._has_run = True
                    return answer
        return self._locked(run)

    def _locked(self, run: Callable[..., Answer], *options: Any) -> Answer:
        """Call ``run`` with the lock held."""
        with self._turn:
            return run(*options)

    def _run_first(self, run: Callable[..., Answer]) -> Answer:
        """Call ``run`` in a thread of its own, and end it at the deadline or if the caller's thread
        is interrupted."""
        options = import_onnxruntime(f"run {self.name}").RunOptions()
        options.log_severity_level = 4  # errors are raised as exceptions
        self._options = options
        self.check_usable()  # another thread may have closed the network before it saw the options
        future: Future[Answer] = Future()
        exiting = threading.Event()

        def work(future: Future[Answer]) -> None:
            # The interpreter calls ``end`` after it has waited for the threads that are no daemons,
            # and before the handler that ONNX Runtime has registered at its import.
            atexit.register(end)
            try:
                future.set_result(self._locked(run, options))
            except BaseException as error:  # raised in the thread of the caller
                if not exiting.is_set():  # else the caller is a daemon thread: it waits for ever
                    future.set_exception(error)
            finally:
                atexit.unregister(end)
                del future  # the traceback of an exception must not refer to the exception

        def end() -> None:
            """End the run at the exit of the interpreter."""
            exiting.set()
            options.terminate = True
            thread.join()

        thread = threading.Thread(target=work, args=[future], name="first run", daemon=True)
        thread.start()
        try:
            wait([future], self.deadline_s and min(self.deadline_s, threading.TIMEOUT_MAX))
        finally:
            late = not future.done()
            if late:
                options.terminate = True
                wait([future], GRACE)
        if not future.done() or future.exception() is not None:
            self._late_s = self.deadline_s if late else None
            self.check_usable()
        try:
            return future.result()
        finally:
            del future  # the traceback of an exception must not refer to the exception
