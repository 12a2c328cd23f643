"""The end of a program whose output nobody reads any longer, as in ``… | head``."""

import os
import sys
from collections.abc import Callable
from typing import Any

# What a shell reports of a program that SIGPIPE has ended.
BROKEN_PIPE = 128 + 13


def ended(main: Callable[[], Any]) -> Any:
    """Runs a program; a pipe that was closed ends it without a traceback."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # here, not when Python ends and nothing is caught
    except BrokenPipeError:
        # What is still buffered goes nowhere when Python closes its files.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
