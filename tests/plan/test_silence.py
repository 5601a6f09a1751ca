"""What C prints is held back for a while, and nothing else."""

import ctypes
import sys

from qsvd.plan.program import silent_stdout


def test_c_is_silent_inside_and_loud_outside(capfd):
    library = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with silent_stdout():
        library.puts(b"noise that C may hold back until the process ends")
        sys.stderr.write("to stderr\n")
    library.puts(b"after")
    library.fflush(None)
    shown = capfd.readouterr()
    assert shown.out == "before\nafter\n"
    assert shown.err == "to stderr\n"
