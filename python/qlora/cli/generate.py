"""``qlora generate``: answers prompts with a 4-bit model and, if given, an adapter."""

import argparse
from pathlib import Path

from qlora.cli import choices

HELP = "answer prompts with a 4-bit model and an adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--adapter", type=Path, help="adapter folder, from qlora finetune or PEFT")
    parser.add_argument("--prompt", action="append", required=True, help="prompt to answer; can be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    choices.add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> int:
    if arguments.temperature < 0:
        raise ValueError(f"temperature={arguments.temperature} must not be negative")
    from qlora.adapters.lora import prompt_end
    from qlora.models.loading import chat_reply, load_for_inference, require_train_extra, resolve_model

    require_train_extra()
    import torch

    torch.manual_seed(arguments.seed)
    resolve_model(arguments.model)
    device, dtype = choices.chosen(arguments)
    model, tokenizer = load_for_inference(arguments.model, arguments.adapter, dtype, device)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {}
    end = "" if arguments.adapter is None or tokenizer.chat_template else prompt_end(arguments.adapter)
    for prompt in arguments.prompt:
        print(chat_reply(model, tokenizer, prompt + end, arguments.max_new_tokens, **sampling))
    return 0
