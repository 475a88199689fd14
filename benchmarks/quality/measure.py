"""Measures what quantization costs: losses of several folders of one model on several texts, paired token by token.

    python benchmarks/quality/measure.py DENSE PLAIN FOLDER… --text near.txt far.txt [--tokens 6000]

DENSE is the model folder, PLAIN its 4-bit copy without calibration. For each text it prints the loss of every folder in
nats per token and the rise over DENSE divided by PLAIN's rise, with the standard error over windows of 512 tokens.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import qlora  # noqa: F401  (registers the 4-bit formats)
from qlora.models.loading import load_tokenizer

_WINDOW = 512
_RESAMPLES = 2000


@torch.no_grad()
def window_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of each window in nats per token, float64 [windows]; the first token of a window has no loss."""
    losses = []
    for window in ids.split(_WINDOW):
        if len(window) == _WINDOW:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]).double())
    return torch.stack(losses)


def rise_ratio(dense: torch.Tensor, plain: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(rise of ``other``) / (rise of ``plain``) over ``dense``, and its bootstrap standard error over windows."""
    pick = torch.randint(len(dense), (_RESAMPLES, len(dense)), generator=torch.Generator().manual_seed(0))
    d, p, o = dense[pick].mean(1), plain[pick].mean(1), other[pick].mean(1)
    ratio = (other.mean() - dense.mean()) / (plain.mean() - dense.mean())
    return ratio.item(), ((o - d) / (p - d)).std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=6000, help="of each text")
    parser.add_argument("--cache", type=Path, help="file that keeps losses between calls")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.dense)
    cache = torch.load(arguments.cache, weights_only=True) if arguments.cache and arguments.cache.exists() else {}
    for folder in (arguments.dense, arguments.plain, *arguments.folders):
        missing = [text for text in arguments.text if (str(folder), text.name, arguments.tokens) not in cache]
        if missing:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for text in missing:
                ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
                losses = window_losses(model, torch.tensor(ids[: arguments.tokens]))
                cache[str(folder), text.name, arguments.tokens] = losses
            if arguments.cache:
                torch.save(cache, arguments.cache)
    for text in arguments.text:
        dense, plain, *others = (
            cache[str(folder), text.name, arguments.tokens]
            for folder in (arguments.dense, arguments.plain, *arguments.folders)
        )
        print(f"{text.name}: dense {dense.mean():.4f}, plain {plain.mean():.4f} nats per token")
        for folder, losses in zip(arguments.folders, others, strict=True):
            ratio, error = rise_ratio(dense, plain, losses)
            print(f"  {folder.name}: {losses.mean():.4f}, rise {ratio:.3f} ± {error:.3f} of plain's")


if __name__ == "__main__":
    main()
