"""Runs llama.cpp (the package xllamacpp) on a GGUF file: reads requests as JSON lines, writes answers as JSON lines.

Its own process, because llama.cpp ends the process when a file is wrong.
Arguments: the model, the size of the context, and optionally a LoRA.
"""

import json
import sys
import urllib.request

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = int(sys.argv[2])
if len(sys.argv) > 3:
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[3], 1.0)]
parameters.n_parallel, parameters.port, parameters.n_gpu_layers = 1, 0, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.warmup, parameters.verbosity, parameters.cache_ram_mib = False, 0, 0
# Keys and values in float32, as in the model beside which it is compared.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)


def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as response:
        return json.load(response)


print("ready", flush=True)
for line in sys.stdin:
    path, body = json.loads(line)
    print(json.dumps(post(path, body)), flush=True)
