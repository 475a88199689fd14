"""Trains a model on several processes with FSDP2, which shards its packed weights, using only torch and PEFT.

Run: torchrun --nproc-per-node 2 examples/train_fsdp2.py --model FOLDER
(docs/guides/several-processes.md tells how on several machines).
Each process uses its own GPU; without GPUs the processes communicate through gloo.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import qlora


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--save", help="folder for a sharded checkpoint")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=qlora.QLoRAConfig(), dtype=torch.bfloat16
    )
    qlora.prepare_model(model, rank=None)
    torch.manual_seed(0)  # the same initial adapters on every process
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=16)).to(device)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = qlora.optim.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    torch.manual_seed(1 + rank)  # different data on each process
    ids = torch.randint(0, model.config.vocab_size, (2, 64), device=device)
    for step in range(arguments.steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / world:.4f}")
    if arguments.save:
        state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=arguments.save)
    dist.destroy_process_group()
    # Everything is saved. After FSDP2 the normal shutdown of gloo's threads sometimes aborts ("terminate called
    # without an active exception"), and torchrun would report a failed run.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
