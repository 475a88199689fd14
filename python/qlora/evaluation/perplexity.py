"""Measures the perplexity of a causal language model over a text, in several weight formats."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora.adapters.lora import check_adapter_folder, load_adapter_into
from qlora.calibration.overlap import from_text, share_seen
from qlora.calibration.report import REPORT_FILE
from qlora.calibration.texts import first_token as first_token_of
from qlora.models.chunked_loss import chunked_loss, why_not_chunked
from qlora.models.loading import load_quantized, load_tokenizer, resolve_model
from qlora.ops import QUANT_TYPES

# Weight formats by name: a dtype of dense weights, or options of QLoRAConfig.
DENSE_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKED_FORMATS: dict[str, dict[str, Any]] = {
    f"{quant_type}{suffix}": {"quant_type": quant_type, "double_quant": bool(suffix)}
    for quant_type in QUANT_TYPES
    for suffix in ("", "-dq")
}
FORMATS = (*DENSE_FORMATS, *PACKED_FORMATS)
STORED = "stored"  # the format of a folder that is already in 4 bit
TRAINED = "trained"  # the format of the base on which an adapter was trained


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log likelihood of the scored tokens, in nats, and the perplexity."""

    nats_per_token: float
    tokens: int  # scored

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def load_in_format(
    model: str | Path,
    name: str,
    dtype: torch.dtype,
    adapter: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The model in the weight format ``name`` (of FORMATS, STORED or TRAINED) on ``device``, in eval mode.

    4-bit formats compute in ``dtype``. Raises ValueError for an unknown format, for another format than STORED of a
    folder that is already in 4 bit, for TRAINED without an adapter that says what it is, and for an adapter that does
    not fit.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_model(model)
    facts = {} if adapter is None else check_adapter_folder(Path(adapter), folder)
    if name == TRAINED and not facts:
        raise ValueError(f"format '{TRAINED}': no adapter from qlora finetune says what that is: use one of {FORMATS}")
    if (name == STORED) != is_quantized(folder):
        rule = f"its only format is {STORED}" if name != STORED else f"use one of {', '.join(FORMATS)}"
        raise ValueError(f"format '{name}': {folder} is {'dense' if name == STORED else 'already quantized'}: {rule}")
    if name == STORED:
        loaded, _ = load_quantized(folder, dtype, device=device, progress=False)
    elif name in DENSE_FORMATS:
        place = {"": torch.device(device)}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=DENSE_FORMATS[name], device_map=place)
    elif name in PACKED_FORMATS or name == TRAINED:
        options = facts if name == TRAINED else PACKED_FORMATS[name]
        loaded, _ = load_quantized(folder, dtype, device=device, progress=False, **options)
    else:
        raise ValueError(f"format '{name}' is unknown: use one of {', '.join(FORMATS)}")
    if adapter is not None:
        loaded = load_adapter_into(loaded, Path(adapter))
    return loaded.eval()


def default_format(model: str | Path, adapter: str | Path | None = None) -> str:
    """STORED for a model in 4 bit, TRAINED for an adapter that says how its base was quantized, else NF4."""
    if is_quantized(model):
        return STORED
    knows = adapter is not None and check_adapter_folder(Path(adapter), resolve_model(model))
    return TRAINED if knows else "nf4-dq"


def is_quantized(model: str | Path) -> bool:
    """Whether a model's folder or id holds quantized weights."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(resolve_model(model)), "quantization_config", None) is not None


def share_in_calibration(model: str | Path, ids: torch.Tensor) -> float | None:
    """The share of the text's runs of eight tokens that the model was calibrated on.

    None for a model without the report of ``qlora quantize``. Raises ValueError for a damaged report.
    """
    path = resolve_model(model) / REPORT_FILE
    if not path.exists():
        return None
    try:
        return share_seen(ids, from_text(json.loads(path.read_text())["seen"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def tokens_of(model: str | Path, text: str) -> tuple[torch.Tensor, int | None]:
    """The text as token ids, int64 [n], and the token with which the tokenizer begins every text, if there is one."""
    tokenizer = load_tokenizer(resolve_model(model))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64, device="cpu"), first_token_of(tokenizer)


@torch.no_grad()
def perplexity(
    model: Any,
    ids: torch.Tensor,
    context: int = 512,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    first_token: int | None = None,
) -> Perplexity:
    """Scores each token of ``ids`` [n] once, except the first, given up to ``context - 1`` tokens before it.

    Windows of ``context`` tokens advance by ``stride`` (default: half the context). So a token has at least
    ``context - stride`` tokens before it, except in the first window. ``first_token`` (see :func:`tokens_of`) stands
    before each window and counts as one of its tokens: models that always begin with it, such as Gemma, compute
    something else without. Raises ValueError for fewer than two tokens, and for a bad context or stride.
    """
    stride = context // 2 if stride is None else stride
    begin = ids.new_tensor([] if first_token is None else [first_token])
    width = context - len(begin)
    if width < 2 or not 1 <= stride < width:
        raise ValueError(f"context={context} must be at least {2 + len(begin)}, and stride={stride} in 1 … {width - 1}")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: at least two are needed, because the first has no score")
    device = next(model.parameters()).device
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    in_chunks = why_not_chunked(base) is None
    total = torch.zeros((), dtype=torch.float64, device=device)  # read only at the end: a read waits for a GPU
    scored, start, end = 1, 0, 0  # tokens before index `scored` are scored
    while scored < len(ids):
        end = min(start + width, len(ids))
        window = torch.cat((begin, ids[start:end])).unsqueeze(0).to(device)
        first = len(begin) + scored - start  # index in the window of the first token to score
        if in_chunks:
            positions = torch.arange(first, window.shape[1], device=device)
            new = chunked_loss(base, window, positions, 1, input_ids=window)
        else:
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            new = torch.nn.functional.cross_entropy(logits[first - 1 :], window[0, first:], reduction="sum")
        total += new.double()
        scored = end
        start += stride
        if on_progress is not None:
            on_progress(scored, len(ids))
    return Perplexity(total.item() / (len(ids) - 1), len(ids) - 1)
