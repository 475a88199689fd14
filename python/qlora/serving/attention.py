"""Attention of a packed batch on a CPU: each request's queries meet only its own keys.

transformers' own path multiplies the queries of all requests with the keys of all requests and masks the rest, which
costs as many times more work as there are requests.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "qlora_packed"


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, kv heads, cached + new tokens, d], requests one after another.

    ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32 [requests + 1] on the CPU, hold where each begins. Returns
    [1, tokens, heads, d]. Raises ValueError for models whose attention adds a cap or a bias to the scores.
    """
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"this model's attention uses {unknown[0]}: load it with attn_implementation='eager'")
    if isinstance(kwargs["cu_seq_lens_k"], dict):  # transformers 5.23 leaves the cache to this function
        key, value = kwargs["cache"].update(key, value, module.layer_idx, kwargs=kwargs)
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    result = torch.empty_like(query)
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        new, all_ = q1 - q0, k1 - k0
        mask = _mask(new, all_, window) if 1 < new != all_ or (window and all_ > window) else None
        result[:, :, q0:q1] = F.scaled_dot_product_attention(
            query[:, :, q0:q1],
            key[:, :, k0:k1],
            value[:, :, k0:k1],
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    return result.transpose(1, 2), None


def _mask(new: int, all_: int, window: int | None) -> Tensor:
    """True where a query sees a key: [new, all_], the last query at the last key, ``window`` keys at most."""
    age = torch.arange(all_ - new, all_).unsqueeze(1) - torch.arange(all_)
    seen = age >= 0
    return seen & (age < window) if window else seen


def register() -> None:
    """Makes the function known to transformers under :data:`NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
