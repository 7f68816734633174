"""Stands in for the binaries of nccl-tests: same options, same lines, same file, and faults by name.

Run as `python nccl_tests_fake.py all_reduce_perf -b 8 ...`. $CX_FAKE is JSON: {"version": "2.19.6", "fault":
"hang", "at": 4096} (`at`: the size where it happens; `each_fault`: instead, in the process with -I 1). Times
are 10 us and 1 us for each 100,000 bytes, plus a tenth for each cycle: every number that is read is known.
{"mpi": true} is a build with MPI=1, which needs a real Open MPI: rank 0 prints, the others wait for it.
Forms: nccl-tests src/common.cu and src/util.cu.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

OPTIONS = {  # letters in the usage of a version
    "2.10.0": "tgbeifnmwNpcodrzyTGah",
    "2.13.10": "tgbeifnmwNpcodrzyTGCaRh",
    "2.17.3": "tgbeifnmwNpcodrzyTGCJaRxDVh",
    "2.18.0": "tgbeifnmwNpcodrzyTGCSJaRxDVMuh",
    "2.19.6": "tgbeifnmwNpcodrzyTGCSJaRxDVMuIKh",
}
JSON_VERSION = {"2.17.3": 1, "2.18.0": 1, "2.19.6": 3}
WIDTH = {"float": 4, "half": 2, "bfloat16": 2}
REDOPS = {**dict.fromkeys(("all_reduce", "reduce_scatter", "reduce", "sendrecv"), "sum"), "hypercube": ""}
SHARED = ("all_gather", "reduce_scatter", "alltoall", "gather", "scatter", "alltoallv", "hypercube")
UNCHECKED_IN_PLACE = ("alltoall", "alltoallv", "sendrecv")
EXITS = {"internal": 1, "cuda": 2, "nccl": 3, "timeout": 4}
SAID = {
    "internal": "",
    "cuda": "myhost: Test CUDA failure common.cu:412 'an illegal memory access was encountered'\n",
    "nccl": "myhost: Test NCCL failure common.cu:999 'unhandled cuda error / NVLS multicast group failed'\n",
    "timeout": "myhost: Test timeout (5s) common.cu:525\n",
}


def main(program: str, words: list[str]) -> int:
    plan = json.loads(os.environ.get("CX_FAKE", "{}"))
    version, fault = plan.get("version", "2.19.6"), plan.get("fault")
    if words == ["-h"]:
        return usage(program, version, fault)
    said = dict(zip([w[1:] for w in words[::2]], words[1::2], strict=True))
    if record := plan.get("record"):
        kept = {
            n: v for n, v in sorted(os.environ.items()) if n.startswith(("NCCL_", "TORCH_SYMM", "NVSHMEM_"))
        }
        with Path(record).open("a") as file:
            file.write(json.dumps({"program": program, "argv": words, "env": kept}) + "\n")
    strange = set(said) - set(OPTIONS[version])
    if strange:
        print(f"invalid option '{sorted(strange)[0]}'")
        return usage(program, version, None)
    if said.get("I") == "1":
        fault = plan.get("each_fault", fault)
    if not plan.get("mpi"):
        return Fake(program, said, version, fault, plan.get("at"), plan).run()
    rank, size, barrier, finalize = mpi()
    said["ranks"] = str(size)
    fake = Fake(program, said, version, fault, plan.get("at"), plan)
    if rank == size - 1 and fault == "peer-crash" and plan["at"] in fake.sizes():
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGSEGV)
    code = fake.run() if rank == 0 else 0
    if code not in (0, 7):
        return code  # as the real one: without MPI_Finalize
    sys.stdout.flush()
    barrier()
    finalize()
    return code


def mpi():
    """(rank, size, MPI_Barrier, MPI_Finalize) of a process that called MPI_Init."""
    import ctypes

    library = ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)
    world = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(library, "ompi_mpi_comm_world")))
    rank, size = ctypes.c_int(), ctypes.c_int()
    library.MPI_Init(None, None)
    library.MPI_Comm_rank(world, ctypes.byref(rank))
    library.MPI_Comm_size(world, ctypes.byref(size))
    return rank.value, size.value, lambda: library.MPI_Barrier(world), library.MPI_Finalize


def usage(program: str, version: str, fault: str | None) -> int:
    if fault == "no-library":
        print(f"{program}: error while loading shared libraries: libnccl.so.2: cannot open", file=sys.stderr)
        return 127
    print(f"USAGE: {program} ")
    for letter in OPTIONS[version]:
        print(f"\t[-{letter},--option_{letter} <value>] ")
    return 0


def number(value: float, width: int) -> str:
    for digits in (2, 1, 0):
        text = f"{value:{width}.{digits}f}"
        if len(text) <= width:
            return text
    return f"{value:{width}.1e}"


class Fake:
    def __init__(self, program, said, version, fault, at, plan):
        self.program, self.said, self.version = program, said, version
        self.fault, self.at, self.plan = fault, at, plan
        self.op = program.removesuffix("_perf")
        self.threads = int(said["t"])
        self.ranks = self.threads * int(said["g"]) * int(said.pop("ranks", "1"))
        self.dtype = "float" if fault == "wrong-dtype" else said["d"]
        self.iters = int(said["n"])
        self.each = said.get("I") == "1"
        self.failed = 0
        self.busbw: list[float] = []
        self.file = None
        self.results: list[dict] = []

    def run(self) -> int:
        if "J" in self.said:
            self.file = Path(self.said["J"])
            print(f"# Writing JSON output to {self.file}")
            self.file.write_text('{"version": 3, "env": ["CX_FAKE=private"')
        self.head()
        if self.fault == "few-gpus":
            print(f"Invalid number of GPUs: {self.ranks} requested but only 1 were found.", file=sys.stderr)
            return 5
        if self.fault in ("early-nccl", "early-hang"):
            return self.stop(self.fault.removeprefix("early-"))
        self.columns()
        if self.fault == "two-tables":  # as two programs that do not know of each other would print
            self.columns()
        for cycle in range(int(self.said.get("N", "1"))):
            for size in self.sizes():
                code = self.row(size, cycle)
                if code is not None:
                    return code
        return self.foot()

    def sizes(self) -> list[int]:
        sizes, size = [], int(self.said["b"])
        while size <= int(self.said["e"]) and not (self.fault == "reduced" and size > self.at):
            sizes.append(size)
            size *= int(self.said["f"])
        return sizes

    def head(self) -> None:
        if self.version >= "2.17.4":
            print(f"# nccl-tests version {self.version} nccl-headers=22809 nccl-library=22809")
        if self.version >= "2.16.7":
            print(f"# Collective test starting: {self.program}")
        s = self.said
        iters = 20 if self.fault == "ignored-iters" else self.iters
        print(
            f"# nThread {s['t']} nGpus {s['g']} minBytes {s['b']} maxBytes {s['e']} step: {s['f']}(factor) "
            f"warmup iters: {s['w']} iters: {iters} agg iters: 1 validation: {s['c']} graph: 0"
        )
        print("#\n# Using devices")
        ranks = 1 if self.fault == "one-rank" else self.ranks
        for rank in range(ranks):
            print(
                f"#  Rank {rank:2} Group  0 Pid {os.getpid():6} on     myhost device {rank:2} "
                "[0000:18:00] NVIDIA H200"
            )
        if self.fault == "reduced":
            print(f"#\n# Reducing maxBytes to {self.at} due to memory limitation")
        sys.stdout.flush()

    def columns(self) -> None:
        clock = "cputime" if self.fault == "cputime" else "time"
        each = ["i_min", "i_max", "i_p99", "i_cv%"] if self.each else []
        once = [clock, "algbw", "busbw", "#wrong", *each]
        print("#\n#                          out-of-place                       in-place")
        print("#  " + "  ".join(["size", "count", "type", "redop", "root", *once, *once]))
        print("#   (B)    (elements)                               (us)  (GB/s)  (GB/s)")

    def row(self, size: int, cycle: int) -> int | None:
        width = WIDTH[self.dtype]
        count = size // width
        if self.op in SHARED:
            count = count // self.ranks & ~(16 // width - 1)
            size = count * self.ranks * width
        if self.op == "alltoallv":
            size = sum(self.parts(size))
        redop = REDOPS.get(self.op, "none")
        root = 0 if self.op in ("broadcast", "reduce", "gather", "scatter") else -1
        print(f"{size:12}  {count:12}  {self.dtype:>8}  {redop:>6}  {root:6}", end="")
        sys.stdout.flush()
        entry = {"size": size, "count": count, "type": self.dtype, "redop": redop, "root": f"{root:6}"}
        for placement in ("out_of_place", "in_place"):
            if size == self.at and self.fault in ("hang", "crash", *EXITS) and placement == "in_place":
                return self.stop(self.fault)
            if size == self.at and self.fault == "peer-crash":
                return self.stop("hang")
            self.body(entry, placement, size, cycle)
        print()
        self.results.append({**entry, "actual_iterations": self.iters, "experiment_name": ""})
        return None

    def parts(self, total: int) -> list[int]:
        """As AlltoAllvGetPeerBytesDistanceWeighted: doubles, and the parts cut to whole 16 bytes."""
        distances = self.ranks * (self.ranks - 1) // 2
        return [int(float(d) * float(total) / float(distances)) & ~15 for d in range(self.ranks)]

    def stop(self, how: str) -> int:
        sys.stdout.flush()
        if how == "hang":
            time.sleep(600)
        if how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        print(SAID[how] + f" .. myhost pid {os.getpid()}: Test failure common.cu:873")
        if self.file:
            self.file.write_text(self.document()[:-200])
        return EXITS[how]

    def body(self, entry: dict, placement: str, size: int, cycle: int) -> None:
        us = (10 + size / 1e5) * (1 + cycle / 10)
        factor = {"all_reduce": 2.0, **dict.fromkeys(SHARED, 1.0)}.get(self.op, 0)
        factor = factor * (self.ranks - 1) / self.ranks if factor else 1.0
        alg = size / us / 1e3
        if self.op == "hypercube":  # its algbw leaves the own share out already
            alg, factor = alg * factor, 1.0
        here = size == self.at and placement == "out_of_place"
        wrong = 5 if self.fault in ("wrong", "wrong-exit-zero") and here else 0
        if self.op == "hypercube" and int(self.said["g"]) > 2:  # all its steps in one group: issue 190
            wrong = 14357568
        checked = not (placement == "in_place" and self.op in UNCHECKED_IN_PLACE)
        self.failed += bool(wrong)
        self.busbw.append(alg * factor)
        shown = "nan" if self.fault == "nan" else number(us, 7).strip()
        error = f"{float(wrong):6g}" if checked else "   N/A"
        print(f"  {shown:>7}  {number(alg, 6)}  {number(alg * factor, 6)}  {error}", end="")
        if self.each:
            print(f"  {us:7.2f}  {us:7.2f}  {us:7.2f}  {0:7.2f}", end="")
        entry[placement] = {
            "time": "nan" if self.fault == "nan" else us,
            "alg_bw": alg,
            "bus_bw": alg * factor,
            "nwrong": float(wrong) if checked else None,
        }
        if self.each:
            times = [us + i for i in range(self.iters)]
            entry[f"{placement}_per_iter"] = {"skipped_iterations": 0, "min_us": us, "times_us": times}

    def foot(self) -> int:
        if self.fault == "no-footer":
            return 0
        bounds = self.failed + (self.fault == "footer-only")
        verdict = "FAILED" if bounds or self.fault == "failed-without-count" else "OK"
        print(f"# Out of bounds values : {bounds} {verdict}")
        print(f"# Avg bus bandwidth    : {sum(self.busbw) / len(self.busbw):g} \n#")
        if self.version >= "2.16.7":
            print(f"# Collective test concluded: {self.program}\n#")
        print()
        if self.file:
            text = self.document()
            self.file.write_text(text[: len(text) // 2] if self.fault == "cut-json" else text)
        if self.fault == "wrong-exit-zero":
            return 0
        return 7 if bounds or self.fault == "exit-seven" else 0

    def document(self) -> str:
        s = self.said
        config = {
            "nthreads": self.threads,
            "ngpus": int(s["g"]),
            "iterations": self.iters,
            "aggregated_iterations": 1,
        }
        config |= {"validation": int(s["c"]), "graph": 0, "blocking_collectives": "false"}
        config["devices"] = [
            {"rank": 0, "pid": os.getpid(), "hostname": "myhost", "device_hex": "0000:18:00", "device": 0}
        ]
        found = {
            "version": self.plan.get("json", JSON_VERSION[self.version]),
            "start_time": "2026-11-20 10:00:00",
            "args": [f"/home/somebody/{self.program}", *(w for n, v in s.items() for w in (f"-{n}", v))],
            "env": [f"{name}={value}" for name, value in os.environ.items()],
            "nccl_version": 22809,
            "config": config,
            "results": self.results[::-1] if self.fault == "other-json" else self.results,
            "out_of_bounds": {"count": self.failed, "okay": "false" if self.failed else "true"},
            "average_bus_bandwidth": {"bandwidth": 1.0, "okay": "unchecked"},
            "errors": [],
            "end_time": "2026-11-20 10:00:05",
        }
        return json.dumps(found)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1], sys.argv[2:]))
