"""The command ``python -m tests.matrix``."""

import sys

from tests.matrix.command import main

if __name__ == "__main__":
    sys.exit(main())
