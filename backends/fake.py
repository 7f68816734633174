"""A library that moves nothing: it computes what would have arrived, and lies on request.

It stands in for every kind of library (all layouts, combine models and casts), so that the harness, the
oracle and the statistics can be tested without one. Each rank simulates all ranks from the routing; no row is
communicated. On `ManualDevice` it spends exactly the time it was told to, elsewhere none.

Knobs
  fault       a name of FAULTS, or name@N: from the N-th call on
  latency_us  microseconds of every component, or "dispatch=12.5,combine=8"
  replay      "dispatch=10:11:12,combine=5" (samples that are cycled through), or the path of a samples
              sidecar
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.types import COLLECTIVE_OPS, MODES, Case, Collective, Moe
from . import base
from ._fake_plan import Fault, Plan, crash
from .base import Context, Facts, MissingLibrary, Source, Variant

if TYPE_CHECKING:
    from ..runtime.problem import MoeProblem
    from ._fake_collective import Call
    from ._fake_exchange import Exchange

_WINDOW = {"dispatch": "nothing but a clock", "combine": "nothing but a clock"}
_BOTH = ("collective", "moe")


def _moe_variants() -> list[Variant]:
    models: list[tuple[str, dict[str, Any]]] = [
        ("rank-sum", {}),
        ("expert-sum", {"layout": "token-expert", "combine": "expert-sum"}),
        ("weighted-sum", {"layout": "token-expert", "combine": "weighted-sum"}),
    ]
    models += [(f"{name}-partials", {**model, "casts": "rank-partials"}) for name, model in models[1:]]
    return [
        Variant(name, mode, ("bf16", "fp8"), _WINDOW, **model)
        for mode in MODES["moe"]
        for name, model in models
    ]


FACTS = Facts(
    name="fake",
    title="moves nothing (for tests)",
    source=Source("bundled", "fake", "this checkout", "tests need a library whose every answer is known"),
    devices=("cpu", "manual"),
    variants=(
        *(
            Variant(
                "",
                mode,
                ("float32", "float16", "bfloat16"),
                {"call": "nothing but a clock"},
                family="collective",
                ops=COLLECTIVE_OPS,
            )
            for mode in MODES["collective"]
        ),
        *_moe_variants(),
    ),
    knobs=("fault", "latency_us", "replay"),
    hidden=True,
)


def _rounds_in_bf16(case: Case) -> bool:
    if isinstance(case.shape, Moe):
        # Two terms add up alike in bf16 and float32; a third shows the difference.
        terms = min(case.shape.topk, case.ranks) if case.variant == "rank-sum" else case.shape.topk
        return terms > 2
    sums = case.shape.op in ("all_reduce", "reduce_scatter", "reduce")
    return sums and case.shape.dtype == "float32" and case.ranks > 1


def _fp8(case: Case) -> bool:
    return case.shape.dtype == "fp8"


def _casts_matter(case: Case) -> bool:
    return case.variant != "rank-sum" and case.ranks > 1


def _out_of_place(case: Case) -> bool:
    return case.family == "moe" or case.mode == "out-of-place"


FAULTS: Mapping[str, Fault] = {
    "dropped-row": Fault("one row never arrives", "dispatch"),
    "duplicated-row": Fault("one row arrives twice", "dispatch"),
    "extra-row": Fault("a row arrives that belongs to another rank", "dispatch"),
    "swapped-rows": Fault("two rows arrive in each other's place", "dispatch"),
    "wrong-expert": Fault("one pick arrives under the next expert's id", "dispatch"),
    "expert-offset": Fault("all picks arrive under the next expert's id", "dispatch"),
    "wrong-source": Fault("one row is another token's than it is said to be", "dispatch"),
    "wrong-count": Fault("one expert is said to have one row more", "dispatch"),
    "weight-missing": Fault("one weight is taken as 1", "dispatch"),
    "weight-twice": Fault("one weight is applied twice", "dispatch"),
    "weights-swapped": Fault("two picks have each other's weight", "dispatch"),
    "truncated-row": Fault("the second half of one row is zero", "dispatch"),
    "column-shift": Fault("one row is shifted by one column", "dispatch"),
    "sign-flip": Fault("the sign bit of one received element is flipped", "dispatch"),
    "low-bit-flip": Fault("the lowest bit of one received element is flipped", "dispatch"),
    "wrong-scale": Fault("the scale of one block is doubled", "dispatch", only=_fp8),
    "stale-dispatch": Fault("the rows of the input set before arrive", "dispatch"),
    "stale-output": Fault("the output is that of the call before", "combine", _BOTH),
    "zeroed-output": Fault("the output is zero", "combine", _BOTH),
    "nan": Fault("one element of the output is NaN", "combine", _BOTH),
    "output-bit-flip": Fault("the lowest bit of one output element is flipped", "combine", _BOTH),
    "partial-write": Fault("the last element, or row, of the output is not written", "combine", _BOTH),
    "reordered-output": Fault("two combined rows are exchanged", "combine"),
    "missing-rank": Fault("the contribution of the last rank is missing", "combine", _BOTH),
    "double-contribution": Fault("one row is added twice", "combine"),
    "bf16-accumulation": Fault("sums are kept in bf16", "combine", _BOTH, _rounds_in_bf16),
    "undeclared-cast": Fault(
        "partial sums are cast where they should not be, or not", "combine", only=_casts_matter
    ),
    "wrong-chunk-order": Fault("the chunks of the output are rotated", "combine", ("collective",)),
    "corruption-1-in-70": Fault("one call in 70 shifts one row, or element", "combine", _BOTH, every=70),
    "late-corruption": Fault("that in every call from the 50th on", "combine", _BOTH, first_call=50),
    "input-modified": Fault("one input element changes its sign", "inputs", _BOTH, _out_of_place),
    "routing-modified": Fault("one routing weight changes", "inputs"),
    "knob-ignored": Fault("what was asked for is not what is set", "knobs", _BOTH),
    "slow": Fault("a call takes one second", "time", _BOTH),
    "hang": Fault("a call never returns", "process", _BOTH),
    "crash": Fault("a call ends in a segmentation fault", "process", _BOTH),
    "exit-nonzero": Fault("a call ends the process with code 11", "process", _BOTH),
    "exit-without-result": Fault("a call ends the process with code 0", "process", _BOTH),
    "sys-exit": Fault("a call raises SystemExit(0)", "process", _BOTH),
    "out-of-memory": Fault("a call runs out of device memory", "process", _BOTH),
    "error": Fault("a call raises RuntimeError", "process", _BOTH),
    "missing-library": Fault("opening the case raises MissingLibrary", "process", _BOTH),
    "crash-in-close": Fault("closing the backend ends in a segmentation fault", "process", _BOTH),
}


class Backend:
    facts = FACTS

    def __init__(self) -> None:
        self.crash_in_close = False

    def why_not(self, case: Case) -> str | None:
        reason = base.why_not(self.facts, case)
        if reason is not None:
            return reason
        name, at, first = str(dict(case.knobs).get("fault", "")).partition("@")
        if not name:
            return None
        if name not in FAULTS:
            return f"fake has no fault {name!r}; it has {', '.join(FAULTS)}"
        if at and not first.isdecimal():
            return f"the fault {name!r} cannot start at call {first!r}; write {name}@5"
        if case.family not in FAULTS[name].families or not FAULTS[name].only(case):
            return f"the fault {name!r} means nothing in {case.id}"
        return None

    def setup(self, context: Context) -> None:
        self.context = context

    def collective(self, case: Case, shape: Collective) -> Call:
        from ._fake_collective import Call

        return Call(self._open(case), self.context, case, shape)

    def moe(self, case: Case, problem: MoeProblem) -> Exchange:
        from ._fake_exchange import Exchange

        variant = self.facts.variant(case)
        assert variant is not None
        return Exchange(self._open(case), self.context.ranks, problem, variant)

    def versions(self) -> Mapping[str, str]:
        return {"fake": "1"}

    def close(self) -> None:
        if self.crash_in_close:
            crash()

    def _open(self, case: Case) -> Plan:
        plan = Plan.of(case, self.context, FAULTS)
        last = self.context.ranks.rank == self.context.ranks.size - 1
        self.crash_in_close = plan.name == "crash-in-close" and last
        if plan.name == "missing-library" and last:
            raise MissingLibrary("the fake library is missing, as asked")
        return plan
