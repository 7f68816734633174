"""stdin: the JSON of `cx plan` for one suite and SKU. stdout: the matrix of a sweep, one job per backend.

Unsupported cells need no machine, but belong to the answer: a backend's job records its own. Exit code 2 when
no backend has a cell to run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter


def main() -> int:
    plan = json.load(sys.stdin)
    to_run = Counter(cell["case"]["backend"] for cell in plan["cells"] if cell["unsupported"] is None)
    if not to_run:
        reasons = Counter(cell["unsupported"] for cell in plan["cells"])
        print(f"error: nothing of {plan['suite']} can run on {plan['sku']}", file=sys.stderr)
        for reason, count in reasons.most_common(5):
            print(f"hint: {count} cells: {reason}", file=sys.stderr)
        return 2
    include = [{"backend": name, "cells": count} for name, count in sorted(to_run.items())]
    print("matrix=" + json.dumps({"include": include}, separators=(",", ":")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
