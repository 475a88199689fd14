"""Process of the distributed tests: trains a few steps under DDP or FSDP2 and writes the result to a file.

torchrun --nproc-per-node N worker.py CHECKPOINT RESULT MODE STEPS [--save FOLDER] [--resume FOLDER]
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import qlora
from qlora.nn import Experts4bit
from qlora.optim import PagedAdamW

BATCH = torch.randint(3, 100, (6, 9), generator=torch.Generator().manual_seed(1))  # divisible by 1, 2 and 3


def build(checkpoint: str):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=qlora.QLoRAConfig(double_quant=False), dtype=torch.float32
    )
    qlora.prepare_model(model, rank=None)
    config = LoraConfig(target_modules="all-linear", r=5, lora_alpha=8)
    if any(isinstance(module, Experts4bit) for module in model.modules()):
        config.target_modules = ["q_proj", "o_proj"]
        config.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        assert not name.endswith("absmax")
    return model


def shard(model, policy: MixedPrecisionPolicy):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("result")
    parser.add_argument("mode", choices=["single", "ddp", "fsdp2", "fsdp2-bf16"])
    parser.add_argument("steps", type=int)
    parser.add_argument("--save")
    parser.add_argument("--resume")
    a = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    model = build(a.checkpoint)
    core = model
    if a.mode == "ddp":
        ignored = qlora.distributed.ignore_frozen(model)
        assert any(name.endswith("absmax") for name in ignored)
        assert any(name.endswith(("base_layer.weight", "base_layer.down_proj")) for name in ignored)
        model = DistributedDataParallel(model)
    elif a.mode.startswith("fsdp2"):
        policy = MixedPrecisionPolicy()
        if a.mode == "fsdp2-bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = core = shard(model, policy)
        weights = [p for n, p in model.named_parameters() if p.dtype == torch.uint8 and ".mlp." in n]
        assert weights
        for weight in weights:  # sharded along its rows, or the experts
            assert type(weight).__name__ == "DTensor"
            assert weight.to_local().shape[0] < weight.shape[0] or world == 1
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if a.resume:
        state, optimizer_state = get_state_dict(core, optimizer)
        saved = {"model": state, "optimizer": optimizer_state}
        dcp.load(saved, checkpoint_id=a.resume)
        set_state_dict(core, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    losses = []
    mine = BATCH.chunk(world)[rank]
    for _ in range(a.steps):
        optimizer.zero_grad()
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    if a.save:
        state, optimizer_state = get_state_dict(core, optimizer)
        dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=a.save)
    full = get_model_state_dict(core, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        kept = {name.removeprefix("module."): tensor for name, tensor in full.items()}
        torch.save({"losses": losses, "state": kept}, Path(a.result))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the result is on disk, and the normal shutdown of torch's threads sometimes aborts


if __name__ == "__main__":
    main()
