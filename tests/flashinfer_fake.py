"""A stand-in for FlashInfer's one-sided all-to-all on threads: rows really move, and its rules are enforced.

Every method takes the keywords of the recorded signatures and no other. What the CUDA extension refuses is
refused here with the same kind of error: types, contiguity, sizes, turns. Slots are given out in another
order in every call, as atomics do; nothing is written to slots that get no row.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

RECORD = Path(__file__).parent / "fixtures" / "signatures" / "flashinfer-d84335d8.json"
SIGNATURES = json.loads(RECORD.read_text())["classes"]
AUX_BYTES = 4096
MAX_PAYLOADS = 6


def checked(owner: str, method: str, given: dict[str, Any]) -> SimpleNamespace:
    """The arguments with defaults, if the recorded method takes them. Raises TypeError as Python would."""
    parameters = SIGNATURES[owner][method]
    unknown = set(given) - {name for name, _, _ in parameters}
    missing = {name for name, _, default in parameters if default is None} - set(given)
    if unknown or missing:
        raise TypeError(f"{owner}.{method}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return SimpleNamespace(**{**dict.fromkeys(name for name, _, _ in parameters), **given})


class World:
    """What the ranks of one job share. `faults` names what to do wrong."""

    def __init__(self, ranks: int, version: str = "0.7.2", faults: tuple[str, ...] = ()):
        self.ranks, self.version, self.faults = ranks, version, faults
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.board: list[Any] = [None] * ranks
        self.constructed = 0

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.barrier.wait()
        out = list(self.board)
        self.barrier.wait()
        return out

    def modules(self, moe_ep: bool = True) -> dict[str, ModuleType | None]:
        flashinfer, comm, mnnvl = (
            ModuleType(n) for n in ("flashinfer", "flashinfer.comm", "flashinfer.comm.mnnvl")
        )
        made = {m.__name__: m for m in (flashinfer, comm, mnnvl)}
        vars(flashinfer).update(__version__=self.version, __git_version__="d84335d8", comm=comm)
        vars(comm).update(
            Mapping=_record("Mapping"), mnnvl=mnnvl, MoeAlltoAll=lambda **k: MoeAlltoAll(self, **k)
        )
        vars(mnnvl).update(MnnvlConfig=_record("MnnvlConfig"), TorchDistBackend=_record("TorchDistBackend"))
        if not moe_ep:
            return {**made, "flashinfer.moe_ep": None}
        newer = ModuleType("flashinfer.moe_ep")
        vars(newer).update(
            BootstrapConfig=_record("BootstrapConfig"),
            MoEEpCommParams=_record("MoEEpCommParams"),
            NVLinkOneSidedAlltoAll=lambda **k: NVLinkOneSidedAlltoAll(self, **k),
        )
        flashinfer.moe_ep = newer  # pyright: ignore[reportAttributeAccessIssue]
        return {**made, "flashinfer.moe_ep": newer}


def _record(owner: str) -> Any:
    return lambda **given: checked(owner, "__init__", given)


class MoeAlltoAll:
    def __init__(self, world: World, **given: Any):
        a = checked("MoeAlltoAll", "__init__", given)
        m = a.mapping
        if not m.world_size == m.tp_size == m.moe_ep_size == world.ranks:
            raise ValueError("expert parallelism is a view of tensor parallelism: all three sizes are one")
        if a.mnnvl_config is None or a.mnnvl_config.comm_backend.group != "world":
            raise RuntimeError("without a communicator it would look for MPI")
        if a.hidden_size is None and a.workspace_size_per_rank is None:
            raise AssertionError("hidden_size must be provided if workspace_size_per_rank is not provided")
        self.world, self.rank, self.size = world, m.rank, world.ranks
        self.max_num_tokens, self.top_k, self.num_experts = a.max_num_tokens, a.top_k, a.num_experts
        row = 2 * (a.hidden_size or 0) + 8 * a.top_k
        bytes_needed = AUX_BYTES + self.size * a.max_num_tokens * (row + 2 * (a.hidden_size or 0)) + 256
        self.workspace = torch.zeros(a.workspace_size_per_rank or bytes_needed, dtype=torch.uint8)
        self.phase, self.calls = "idle", 0
        world.constructed += 1
        self.peers: list[MoeAlltoAll] = world.gather(self.rank, self)

    def dispatch(self, **given: Any) -> list[torch.Tensor]:
        a = checked("MoeAlltoAll", "dispatch", given)
        if self.phase != "idle":
            raise AssertionError("dispatch called twice without combine")
        ids, payloads, most = a.token_selected_experts, a.input_payloads, a.runtime_max_tokens_per_rank
        self._check_input(ids, payloads, most, a)
        self.calls += 1
        every = self.world.gather(self.rank, (ids.clone(), [p.clone() for p in payloads], most))
        if len({m for _, _, m in every}) != 1:
            raise AssertionError("runtime_max_tokens_per_rank differs between ranks")
        self.views, offset = [], AUX_BYTES
        for p in payloads:
            width = p.shape[1] * p.element_size()
            end = offset + self.size * most * width
            self.views.append(self.workspace[offset:end].view(p.dtype).view(self.size, most, -1))
            offset = end
        self.payload_offset = -(-offset // 128) * 128
        per_rank = self.num_experts // self.size
        self.sent: list[list[tuple[int, int]]] = []  # of this rank's tokens: (rank, slot) for each copy
        self.counts = [0] * self.size
        for source, (experts, sources, _) in enumerate(every):
            order = list(range(len(experts)))
            order = order[self.calls % max(1, len(order)) :] + order[: self.calls % max(1, len(order))]
            slots = {}
            for token in order:
                if (experts[token] // per_rank == self.rank).any():
                    slots[token] = self.counts[source]
                    for view, payload in zip(self.views, sources, strict=True):
                        view[source, slots[token]] = payload[token]
                    self.counts[source] += 1
            told = self.world.gather(self.rank, slots) if source >= 0 else []
            if source == self.rank:
                self.sent = [
                    [(r, of[t]) for r, of in enumerate(told) if t in of] for t in range(len(experts))
                ]
        if a.invalid_token_expert_id is not None and "unmarked" not in self.world.faults:
            for source, count in enumerate(self.counts):
                self.views[a.expert_id_payload_index][source, count:] = a.invalid_token_expert_id
        self.most, self.tokens, self.phase = most, len(ids), "dispatched"
        self.world.barrier.wait()
        return list(self.views)

    def _check_input(self, ids: torch.Tensor, payloads: list[torch.Tensor], most: int, a: Any) -> None:
        if ids.dtype != torch.int32 or not ids.is_contiguous() or ids.shape[1:] != (self.top_k,):
            raise TypeError(f"token_selected_experts must be contiguous int32 [n, {self.top_k}]")
        if not 0 < most <= self.max_num_tokens or len(ids) > most:
            raise AssertionError("runtime_max_tokens_per_rank exceeds max_num_tokens")
        if not 0 < len(payloads) <= MAX_PAYLOADS:
            raise ValueError("Too many payloads")
        for p in payloads:
            if p.ndim != 2 or not p.is_contiguous() or len(p) != len(ids):
                raise ValueError("a payload must be contiguous [n, columns]")
            if p.dtype not in (torch.bfloat16, torch.uint8, torch.float32, torch.int32):
                raise TypeError(f"the binding does not know {p.dtype}")
        if a.invalid_token_expert_id is not None and a.expert_id_payload_index is None:
            raise AssertionError("expert_id_payload_index required when invalid_token_expert_id is set")
        if a.expert_id_payload_index is not None and payloads[a.expert_id_payload_index] is not ids:
            raise AssertionError("that payload is not the expert ids")

    def get_combine_payload_tensor_in_workspace(self, **given: Any) -> torch.Tensor:
        a = checked("MoeAlltoAll", "get_combine_payload_tensor_in_workspace", given)
        if self.phase != "dispatched":
            raise RuntimeError("get_combine_payload_tensor_in_workspace called before successful dispatch")
        return self._region(a.hidden_size, a.dtype)

    def _region(self, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.size, self.most, hidden)
        end = self.payload_offset + self.size * self.most * hidden * dtype.itemsize
        return self.workspace[self.payload_offset : end].view(dtype).view(shape)

    def combine(self, **given: Any) -> torch.Tensor:
        a = checked("MoeAlltoAll", "combine", given)
        if self.phase != "dispatched":
            raise AssertionError("combine called before successful dispatch")
        payload = a.payload
        if payload.shape[:2] != (self.size, self.most) or payload.ndim != 3 or not payload.is_contiguous():
            raise ValueError("payload must be contiguous [ep_size, runtime_max_tokens_per_rank, hidden]")
        if a.runtime_max_tokens_per_rank != self.most:
            raise AssertionError("combine is told another size than dispatch")
        region = self._region(payload.shape[2], payload.dtype)
        if a.payload_in_workspace:
            if payload.data_ptr() != region.data_ptr():
                raise RuntimeError("payload_in_workspace is True but tensor pointer mismatch")
        else:
            for source, count in enumerate(self.counts):
                region[source, :count] = payload[source, :count]
        self.world.barrier.wait()
        out = torch.zeros(self.tokens, payload.shape[2], dtype=torch.float32)
        for token, copies in enumerate(self.sent):
            for rank, slot in copies:
                out[token] += (
                    self.peers[rank]._region(payload.shape[2], payload.dtype)[self.rank, slot].float()
                )
                if "bf16-sums" in self.world.faults:
                    out[token] = out[token].to(torch.bfloat16).float()
        self.world.barrier.wait()
        self.phase = "idle"
        return out.to(payload.dtype)


class NVLinkOneSidedAlltoAll:
    """The newer entry point over the older: two dimensions instead of three, keywords of its own."""

    def __init__(self, world: World, **given: Any):
        a = checked("NVLinkOneSidedAlltoAll", "__init__", given)
        if "no-nvlink" in world.faults:
            raise RuntimeError("NVLink backends are not supported on EP ranks [0]")
        b, p = a.bootstrap, a.params
        if p.invalid_expert_id != -1 or b.world_size != world.ranks:
            raise ValueError("not what the adapter should ask for")
        mapping = SimpleNamespace(
            world_size=b.world_size, tp_size=b.world_size, moe_ep_size=b.world_size, rank=b.rank
        )
        comm = SimpleNamespace(comm_backend=SimpleNamespace(group=b.process_group))
        self.alltoall = MoeAlltoAll(
            world,
            mapping=mapping,
            max_num_tokens=p.max_tokens_per_rank,
            top_k=p.top_k,
            num_experts=p.num_experts,
            hidden_size=p.hidden_size,
            mnnvl_config=comm,
        )

    def dispatch(self, **given: Any) -> SimpleNamespace:
        a = checked("NVLinkOneSidedAlltoAll", "dispatch", given)
        if a.topk_ids.dtype != torch.int32:
            raise TypeError("other ids are cast inside the window: the adapter passes int32")
        scales = [] if a.hidden_states_scale is None else [a.hidden_states_scale]
        views = self.alltoall.dispatch(
            token_selected_experts=a.topk_ids,
            input_payloads=[a.hidden_states, *scales, a.topk_ids, a.topk_weights],
            runtime_max_tokens_per_rank=a.max_tokens_per_rank,
            invalid_token_expert_id=-1,
            expert_id_payload_index=1 + len(scales),
        )
        flat = [view.flatten(0, 1) for view in views]
        return checked(
            "MoEEpDispatchResult",
            "__init__",
            {
                "hidden_states": flat[0],
                "hidden_states_scale": flat[1] if scales else None,
                "topk_ids": flat[-2],
                "topk_weights": flat[-1],
                "tokens_per_rank": a.max_tokens_per_rank,
            },
        )

    def combine(self, **given: Any) -> torch.Tensor:
        a = checked("NVLinkOneSidedAlltoAll", "combine", given)
        most = self.alltoall.most
        payload = a.expert_output.view(self.alltoall.size, most, -1)
        return self.alltoall.combine(payload=payload, runtime_max_tokens_per_rank=most)
