"""Measures what a merge into 4 bit keeps of an adapter: held-out loss without it, with it, and after merging.

    python benchmarks/quality/merge.py BASE ADAPTER EVAL.jsonl MERGED…

BASE is the model folder the adapter belongs to, MERGED are folders from `qlora merge --format nf4`. Kept is the share
of the adapter's fall of the loss on the assistant's turns of EVAL.
"""

import argparse
from pathlib import Path

import torch

from qlora.models.loading import load_for_inference, load_quantized, load_tokenizer
from qlora.training.data import IGNORED, tokenize_all
from qlora.training.records import read_records


@torch.no_grad()
def loss_of(model: torch.nn.Module, records: Path, tokenizer: object) -> float:
    """Nats per token of the assistant's turns."""
    total, count = 0.0, 0
    for example in tokenize_all(read_records(records)[0], tokenizer, 512).examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("merged", type=Path, nargs="*")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.base)
    adapted, _ = load_for_inference(arguments.base, arguments.adapter, torch.float32)
    with_adapter = loss_of(adapted, arguments.records, tokenizer)
    with adapted.disable_adapter():
        without = loss_of(adapted, arguments.records, tokenizer)
    print(f"without the adapter {without:.3f}, with it {with_adapter:.3f} nats per token")
    for folder in arguments.merged:
        model, _ = load_quantized(folder, torch.float32, progress=False)
        loss = loss_of(model, arguments.records, tokenizer)
        print(f"{folder.name}: {loss:.3f}, kept {(without - loss) / (without - with_adapter):.0%}")


if __name__ == "__main__":
    main()
