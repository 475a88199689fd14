"""Trains a small Llama from scratch on Python's standard library: a model whose weights never were in 4 bit.

    python benchmarks/quality/train_small.py OUTPUT [--minutes 12]

Writes OUTPUT/model (6 blocks of width 256, a byte-level BPE of 4,096 tokens) and OUTPUT/heldout.txt, every twentieth
file, which the model has not seen. Runs on CPUs; the result depends on the Python version and on the time.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_END = "<|end|>"
_WINDOW, _BATCH = 256, 16


def library_files() -> list[Path]:
    """The sources of the standard library without its tests, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    return [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    arguments = parser.parse_args()
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in library_files()]
    heldout, seen = texts[::20], [text for i, text in enumerate(texts) if i % 20]
    arguments.output.mkdir(parents=True)
    (arguments.output / "heldout.txt").write_text("\n\n".join(heldout))
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(seen, vocab_size=4096, special_tokens=[_END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token=_END, pad_token=_END)
    ids = torch.tensor([i for text in seen for i in [*core.encode(text).ids, tokenizer.eos_token_id]])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start, step, smooth = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - 0.95 * done)
        first = torch.randint(len(ids) - _WINDOW, (_BATCH,))
        rows = ids[first[:, None] + torch.arange(_WINDOW)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {done:.0%}, loss {smooth:.3f}", flush=True)
    model.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    print(f"{step} steps of {_BATCH * _WINDOW} tokens, of {len(ids)} in the text; loss {smooth:.3f}")


if __name__ == "__main__":
    main()
