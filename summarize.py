#!/usr/bin/env python3
"""Results as a table (text, Markdown or JSON), and the gate: `python summarize.py DIR... --format markdown`.

The same as `cx summarize`; works from a bare checkout, with nothing of ours installed.
"""

import sys

from collectivex.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main(["summarize", *sys.argv[1:]]))
