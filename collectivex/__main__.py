"""`python -m collectivex` is the command `collectivex` (short: `cx`)."""

import sys

from collectivex.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
