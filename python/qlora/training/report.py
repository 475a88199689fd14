"""What a run leaves for people: report.json with the figures, report.png with the loss curve and the memory."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from qlora.storage.files import atomic_write
from qlora.models.prepare import qlora_layers
from qlora.nn import Linear4bit

MIB = 2**20


def memory_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of the model by what they are for; AdamW's two float32 states are counted with the trainable parameters."""
    packed = statistics = dense_equivalent = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            packed += module.weight.nbytes
            statistics += sum(t.nbytes for t in module.quantized_weight.tensors[1:])
            dense_equivalent += 2 * module.in_features * module.out_features
    adapters = sum(
        p.nbytes for layer in qlora_layers(model).values() for p in (*layer.lora_a.values(), *layer.lora_b.values())
    )
    total = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "linear_layers_16bit": dense_equivalent,
        "linear_layers_4bit": packed,
        "scales": statistics,
        "embeddings_and_rest": total - packed - statistics - adapters,
        "adapters": adapters,
        "gradients": 4 * trainable,
        "adamw_states": 8 * trainable,
    }


def write_report(folder: Path, figures: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes report.json and report.png. ``history`` is the Trainer's log."""
    atomic_write(folder / "report.json", json.dumps({**figures, "history": history}, indent=2).encode())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if train:
        left.plot(*zip(*train, strict=True), label="training", color="#4477aa")
    if evaluation:
        left.plot(*zip(*evaluation, strict=True), "o-", label="evaluation", color="#cc3311")
    left.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    left.legend()
    left.grid(alpha=0.3)
    memory = figures["memory_bytes"]
    right.barh([kind.replace("_", " ") for kind in memory], [size / MIB for size in memory.values()], color="#4477aa")
    for row, size in enumerate(memory.values()):
        right.text(size / MIB, row, f" {size / MIB:.1f}", va="center")
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(xlabel="MiB", title="Memory by kind")
    figure.tight_layout()
    temporary = folder / ".report.png"
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    temporary.replace(folder / "report.png")
