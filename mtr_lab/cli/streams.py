"""Output to terminals of any encoding, and to programs that stop reading it."""

import io
import os
import sys


def print_in_any_encoding() -> None:
    """Print ``?`` for characters that the terminal's encoding lacks, such as ``…`` in ASCII, instead of ending."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def stop_printing() -> None:
    """Drop what is printed to stdout from now on: after an error in writing to it, another one would follow at exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
