"""An external program for machines without GPUs, as a package outside the repository would bring it:
nccl_tests with the binaries of nccl_tests_bin.py, found through the entry point beside this file.
"""

from __future__ import annotations

from dataclasses import replace

from collectivex.backends import base, nccl_tests
from collectivex.runtime.types import Case

FACTS = replace(nccl_tests.FACTS, name="cpu_tests", devices=("cpu",), recipe=None, hidden=True)


class Backend(nccl_tests.Backend):
    """See base.Program."""

    facts = FACTS

    def why_not(self, case: Case) -> str | None:
        return base.why_not(FACTS, case)
