"""How long a user waits for the commands that measure nothing: best of several, whole processes.

    python benchmarks/cli_speed.py

Targets on a quiet 2-core machine: `cx --help` 0.2 s, `cx plan` over every suite and SKU 1 s.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (("--help",), ("plan",), ("list", "backends"), ("validate", "--published", "results"))
REPEATS = 5


def main() -> int:
    for command in COMMANDS:
        argv = [sys.executable, "-m", "collectivex", *command]
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            subprocess.run(argv, check=True, capture_output=True, cwd=ROOT)
            seconds.append(time.perf_counter() - began)
        median = sorted(seconds)[REPEATS // 2]
        print(f"cx {' '.join(command):32} best {min(seconds):6.3f} s  median {median:6.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
