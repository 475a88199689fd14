"""Writes a dense copy of a model with AutoRound's 4-bit weights in its linear layers, as an anchor for measure.py.

    pip install auto-round
    python benchmarks/quality/autoround_anchor.py MODEL OUTPUT

Groups of 64 with a 16-bit scale and a 4-bit zero point: 4.31 bits a weight, in a layout of its own. Calibrated on
qlora's default text, in as many tokens as `qlora quantize` takes. --iters is AutoRound's number of steps for a block
(its default is 200).
"""

import argparse
import importlib.util
from pathlib import Path

from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("qlora.calibration")
    text = Path(spec.submodule_search_locations[0], "default.jsonl")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    scheme = {"bits": 4, "group_size": 64, "sym": False, "data_type": "int"}
    options = {"dataset": str(text), "seqlen": 512, "nsamples": 32, "batch_size": 4, "device_map": "cpu"}
    rounding = AutoRound(model, tokenizer, scheme=scheme, iters=arguments.iters, **options)
    rounding.quantize_and_save(str(arguments.output), format="fake")


if __name__ == "__main__":
    main()
