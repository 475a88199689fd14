"""Process of a distributed test: a mixture whose experts transformers divides among two processes.

torchrun --nproc-per-node 2 expert_parallel.py PACKED DENSE RESULT
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import qlora
from qlora.nn import Experts4bit

packed, dense, result = sys.argv[1:]
dist.init_process_group("gloo")
options = {"dtype": torch.float32, "distributed_config": DistributedConfig(fsdp_size=2, ep_size=2)}
errors = []
try:
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=qlora.QLoRAConfig(), **options)
except RuntimeError as error:  # transformers prints the reason
    errors.append(str(error))
try:
    AutoModelForCausalLM.from_pretrained(packed, distributed_config=DistributedConfig(tp_size=2))
except ValueError as error:
    errors.append(str(error))
model = AutoModelForCausalLM.from_pretrained(packed, **options)
mine = [module.num_experts for module in model.modules() if isinstance(module, Experts4bit)]
ids = torch.tensor([[1, 5, 9, 77, 30, 8, 2, 100]]) + dist.get_rank()  # another batch on each process
embedded = torch.nn.functional.embedding(ids, torch.randn(256, 64, generator=torch.Generator().manual_seed(3)))
embedded.requires_grad_()
logits = model(inputs_embeds=embedded, use_cache=False).logits
logits.square().mean().backward()
with torch.no_grad():
    alone = model(inputs_embeds=embedded, use_cache=False).logits
try:
    model.save_pretrained(result + "-saved")
except ValueError as error:
    errors.append(str(error))
torch.save(
    {"experts": mine, "errors": errors, "logits": logits.detach(), "alone": alone, "grad": embedded.grad},
    f"{result}-{dist.get_rank()}.pt",
)
dist.barrier()
os._exit(0)  # the result is on disk, and the normal shutdown of torch's threads sometimes aborts
