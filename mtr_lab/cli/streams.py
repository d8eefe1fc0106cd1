"""Output for terminals of any encoding."""

import io
import sys


def print_in_any_encoding() -> None:
    """Print ``?`` for characters that the terminal's encoding lacks, such as ``…`` in ASCII, instead of ending."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
