"""PagedAdamW: AdamW in one pass per parameter, with 32-bit or 8-bit state in memory that can be paged out."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlora import _C, ops
from qlora.optim.paging import Pages, Resident, pages_for

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALES = ("exp_avg_absmax", "exp_avg_sq_absmax")


def _is_distributed(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Tensor:
    """This process's shard of a distributed tensor (FSDP2), or the tensor itself."""
    return tensor.to_local() if _is_distributed(tensor) else tensor


class PagedAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with moments in float32 or in blockwise 8 bit (Dettmers et al. 2022).

    Args:
        params: contiguous parameters of any float dtype; those of ``fully_shard`` need bits=32.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        bits: 32, or 8 for both moments in two bytes per parameter, plus an absmax for each 256 elements.
        min_8bit_size: parameters with fewer elements keep float32 moments.
        page_dir: for parameters on the CPU: a folder on disk that holds the state instead of memory.
        paged: for parameters on a GPU: keep the state in managed memory, which the driver pages out to the host.

    A step is bitwise the same on every device. Raises ValueError with the value and the rule for bad arguments.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        min_8bit_size: int = 4096,
        page_dir: str | Path | None = None,
        paged: bool = True,
    ) -> None:
        if bits not in (32, 8):
            raise ValueError(f"bits={bits} must be 32 or 8")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        for value in betas:
            if not 0 <= value < 1:
                raise ValueError(f"betas={betas} must be in [0, 1)")
        self.bits, self.min_8bit_size = bits, min_8bit_size
        self._page_dir, self._paged = page_dir, paged
        self._pages: dict[torch.device, Pages] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    # ---- state ----

    def _pages_of(self, device: torch.device) -> Pages:
        if device not in self._pages:
            self._pages[device] = pages_for(device, self._page_dir, self._paged)
        return self._pages[device]

    def _is_8bit(self, param: Tensor) -> bool:
        return self.bits == 8 and param.numel() >= self.min_8bit_size

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        local = _local(param)
        pages, shape = self._pages_of(local.device), tuple(local.shape)
        state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}  # as torch.optim.AdamW
        if self._is_8bit(param):
            if _is_distributed(param):
                raise ValueError("bits=8: blocks of 256 moments cannot be sharded over processes; use bits=32")
            for name in _MOMENTS:
                state[name] = pages.zeros(shape, torch.uint8)
            for name in _SCALES:
                state[name] = pages.zeros((-(-param.numel() // _C.MOMENT_BLOCK),), torch.float32)
            return state
        for name in _MOMENTS:
            moment = pages.zeros(shape, torch.float32)
            state[name] = _like(moment, param) if _is_distributed(param) else moment
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state, without changing its dtypes, into memory that is paged as this optimizer's options say.

        Raises ValueError if the state belongs to another optimizer or has another number of bits.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            state = self._new_state(param)
            if saved.keys() != state.keys():
                raise ValueError(
                    f"the state of parameter {i} has {sorted(saved)}: with bits={self.bits} and"
                    f" min_8bit_size={self.min_8bit_size} it must have {sorted(state)}"
                )
            for name, tensor in state.items():
                value = saved[name]
                if name == "step":
                    tensor.fill_(float(value))
                elif value.dtype != tensor.dtype or value.shape != tensor.shape:
                    raise ValueError(
                        f"'{name}' of parameter {i} is {value.dtype} {tuple(value.shape)}: it must be"
                        f" {tensor.dtype} {tuple(tensor.shape)}"
                    )
                else:
                    _local(tensor).copy_(_local(value))
            self.state[param] = state

    # ---- steps ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for all parameters that have a gradient. Returns the closure's loss, or None.

        Raises ValueError for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for param, _ in work:
            if param.grad.is_sparse:
                raise ValueError("PagedAdamW does not support sparse gradients")
            if not self.state[param]:
                self.state[param] = self._new_state(param)
        resident = [(param, group) for param, group in work if self._is_resident(param)]
        paged = [(param, group) for param, group in work if not self._is_resident(param)]
        for i, (param, group) in enumerate(paged):
            if i + 1 < len(paged):
                self._prefetch(paged[i + 1][0])
            self._update([param], group)
        # To save launches, parameters with the same group, device and number of bits share a call.
        together: dict[tuple[int, torch.device, bool], list[Tensor]] = {}
        groups = {id(group): group for group in self.param_groups}
        for param, group in resident:
            key = (id(group), param.device, _SCALES[0] in self.state[param])
            together.setdefault(key, []).append(param)
        for (group_id, _, _), params in together.items():
            self._update(params, groups[group_id])
        return loss

    def _is_resident(self, param: Tensor) -> bool:
        return isinstance(self._pages_of(_local(param).device), Resident)

    def _prefetch(self, param: Tensor) -> None:
        pages = self._pages_of(_local(param).device)
        for name, tensor in self.state[param].items():
            if name != "step":
                pages.prefetch(_local(tensor))

    def _update(self, params: list[Any], group: dict[str, Any]) -> None:
        """One step for parameters whose moments all have the same number of bits."""
        states, steps = [], []
        for param in params:
            state = self.state[param]
            names = (_MOMENTS[0], _SCALES[0], _MOMENTS[1], _SCALES[1]) if _SCALES[0] in state else _MOMENTS
            states.append([_local(state[name]) for name in names])
            steps.append(int(state["step"].item()) + 1)
        beta1, beta2 = group["betas"]
        ops.adamw_many(
            [_local(param) for param in params],
            [_local(param.grad) for param in params],
            states,
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            steps,
        )
        for param in params:
            self.state[param]["step"] += 1


def _like(local: Tensor, param: Any) -> Tensor:
    """A distributed tensor, sharded like ``param``, of which ``local`` is this process's shard."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
