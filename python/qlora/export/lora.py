"""Reads the adapter of a folder as factors, for runtimes that add them to a base themselves."""

import json
from pathlib import Path

from qlora.adapters.factors import Factors, factors_of
from qlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE, require_own_base
from qlora.storage.weights import open_safetensors

_MERGE = "a separate adapter cannot express that. Export the merged model: without --adapter-only, or with qlora merge"


def read_factors(adapter: Path) -> dict[str, Factors]:
    """The factors by layer name.

    Raises FileNotFoundError without the file, and ValueError as :func:`factors_of`, and for an adapter whose
    initialization changed the base.
    """
    config = json.loads((adapter / CONFIG_FILE).read_text())
    require_own_base(config, adapter / CONFIG_FILE)
    path = adapter / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open_safetensors(path) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return factors_of(tensors, config, path, _MERGE)
