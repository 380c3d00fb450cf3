"""End a script quietly after Ctrl-C.

A script calls `stop_at_once` before all other imports. While its libraries are imported, Ctrl-C must not raise
KeyboardInterrupt: numpy, torch and transformers turn an exception into others, or ignore it. `raise_again` ends that
when the script's main begins. From then on Ctrl-C raises KeyboardInterrupt, so that files are cleaned up.
"""

import os
import signal
import sys


def script() -> str:
    """Return the file name of the script that runs."""
    return os.path.basename(getattr(sys.modules["__main__"], "__file__", None) or sys.argv[0])


def stop_at_once() -> None:
    """From now on Ctrl-C ends the process with one line. A process that ignores Ctrl-C goes on to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def end(number: int, frame) -> None:
    """Print a line, and end this process as the signal would."""
    os.write(2, f"\n{script()}: stopped\n".encode(errors="replace"))
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def raise_again() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, which ends the process with one line if nothing catches it."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = excepthook


def excepthook(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{script()}: stopped", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)
