"""Child processes that never outlive us: started in their own group, ended in order, killed if they must be.

And the name under which we run ourselves.

Knows processes and signals, not what runs in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from setproctitle import setproctitle

_PR_SET_PDEATHSIG = 1


def retitle(command: str) -> None:
    """What `ps` shows of this process from now on, in the place of arguments that may hold a password."""
    setproctitle(f"embedq {command}")


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a command with its output in `log`. On Linux the kernel ends it even when we are killed.

    In a session of its own: Ctrl-C in the terminal reaches us alone, and we end our children in order.
    """
    with log.open("ab") as output, _holding_signals_back() as mask:
        # Commands of our own: this Python or a redis-server.
        return subprocess.Popen(  # nosec B603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_in_child(mask),
        )


@contextlib.contextmanager
def _holding_signals_back() -> Iterator[set[signal.Signals]]:
    """Ctrl-C and SIGTERM come after the block. Python runs callbacks around a fork, and what a signal's handler raises
    in one of those is dropped. Gives the mask as it was, for the child.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(
    command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Starts a command whose output, both kinds in one pipe, we read.

    May be called beside threads: no code of ours runs between fork and exec. The command calls `follow_parent`.
    """
    # This Python.
    return subprocess.Popen(  # nosec B603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        pass_fds=pass_fds,
    )


def follow_parent(parent: int) -> None:
    """Has the kernel send us SIGTERM when the thread that started us ends. Ends us if its process has ended already."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)


def reap_strangers(ours: Collection[int]) -> None:
    """Takes note of ended processes that were left to us, as process 1 of a container must. `ours` are left alone."""
    while ended := _ended_child():
        if ended in ours:
            return
        os.waitpid(ended, os.WNOHANG)


def _ended_child() -> int | None:
    """The number of one, which stays as it is."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found else None


def stop(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """SIGTERM, and after the grace SIGKILL; the exit status. A process that has ended is left alone."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def last_lines(log: Path, number: int = 5) -> str:
    """The end of a log, for an error message."""
    if not log.exists():
        return "(no output)"
    lines = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-number:]) or "(no output)"


def _in_child(mask: set[signal.Signals]) -> Callable[[], None]:
    """What a child does between fork and exec. mask: the signals that are held back from it, which exec keeps."""
    is_linux = sys.platform.startswith("linux")
    # Loaded here: between fork and exec nothing may be imported.
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_linux:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return prepare
