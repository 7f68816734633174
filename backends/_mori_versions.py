"""Which MoRI is loaded: its signatures beside those recorded from the sources of each tag.

MoRI inserts parameters in the middle and its version string may be "unknown", so the shape of what is called
tells more than a number does.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from .base import MissingLibrary

# Digest of the signatures of a tag -> the tag. From tests/fixtures/signatures/mori-<tag>.json.
RECORDED: Mapping[str, str] = {
    "0ec8dbda3157": "v1.1.1",
    "1d5e1c2e8722": "v1.2.0",
    "f425e6516e97": "v1.2.1 or v1.2.2",
}
# Known, and not driven: why.
REFUSED: Mapping[str, str] = {"d1643dc7a1df": "MoRI v1.1.0 does not tell with which launch a call ran"}

KERNEL_TYPES = ("IntraNode", "IntraNodeLL", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL")

# What the adapter passes, by name: a library without one of these is another library.
CONFIG = (
    *("data_type", "rank", "world_size", "hidden_dim", "scale_dim", "scale_type_size", "max_token_type_size"),
    *("max_num_inp_token_per_rank", "num_experts_per_rank", "num_experts_per_token", "warp_num_per_block"),
    *("block_num", "use_external_inp_buf", "kernel_type", "gpu_per_node", "rdma_block_num", "quant_type"),
)
_LAUNCH = ("block_num", "warp_per_block")
OP: Mapping[str, tuple[str, ...]] = {
    "dispatch": ("input", "weights", "scales", "indices", "rdma_block_num", *_LAUNCH),
    "dispatch_send": ("input", "weights", "scales", "indices", *_LAUNCH),
    "dispatch_recv": _LAUNCH,
    "combine": ("input", "weights", "indices", "rdma_block_num", *_LAUNCH),
    "combine_send": ("input", "weights", "indices", *_LAUNCH),
    "combine_recv": _LAUNCH,
    "get_registered_combine_input_buffer": ("dtype", "hidden_dim"),
    "get_launch_config": ("is_dispatch", "rdma_block_num", *_LAUNCH),
}
SHMEM: Mapping[str, tuple[str, ...]] = {
    "shmem_torch_process_group_init": ("group_name",),
    "shmem_finalize": (),
}

Signature = list[list[Any]]  # [name, kind, default] of each parameter but self, in order
EXPRESSION = "expression"  # stands for a default that is no literal


def identify(ops: Any, shmem: Any) -> str:
    """The recorded tag whose signatures the loaded modules have, else "unrecorded-<digest>".

    Raises MissingLibrary where something that the adapter passes is not a parameter, and for a refused tag.
    """
    missing = [
        f"EpDispatchCombineConfig({n})" for n in CONFIG if n not in _names(ops.EpDispatchCombineConfig)
    ]
    for owner, wanted in ((ops.EpDispatchCombineOp, OP), (shmem, SHMEM)):
        for function, names in wanted.items():
            if not hasattr(owner, function):
                missing.append(function)
            else:
                missing += [f"{function}({n})" for n in names if n not in _names(getattr(owner, function))]
    if missing:
        raise MissingLibrary(
            f"this MoRI has no {', '.join(missing)}; the adapter fits {', '.join(RECORDED.values())}"
        )
    found = digest(
        {
            "config": signature(ops.EpDispatchCombineConfig),
            "op": {name: signature(getattr(ops.EpDispatchCombineOp, name)) for name in OP},
            "shmem": {name: signature(getattr(shmem, name)) for name in SHMEM},
            "kernel_types": [n for n in KERNEL_TYPES if hasattr(ops.EpDispatchCombineKernelType, n)],
        }
    )
    if found in REFUSED:
        raise MissingLibrary(f"{REFUSED[found]}; the adapter fits {', '.join(RECORDED.values())}")
    return RECORDED.get(found, f"unrecorded-{found}")


def digest(signatures: Mapping[str, Any]) -> str:
    """12 hex digits over recorded or loaded signatures."""
    parts = [signatures[part] for part in ("config", "op", "shmem")]
    text = json.dumps([*parts, sorted(signatures["kernel_types"])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def signature(function: Callable[..., Any]) -> Signature:
    """As it would be recorded from the source."""
    out: Signature = []
    for p in inspect.signature(function).parameters.values():
        if p.name == "self":
            continue
        default = None if p.default is p.empty else _literal(p.default)
        out.append([p.name, "keyword" if p.kind is p.KEYWORD_ONLY else "any", default])
    return out


def _literal(default: Any) -> str:
    plain = default is None or type(default) in (bool, int, float, str)
    return repr(default) if plain else EXPRESSION


def _names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
