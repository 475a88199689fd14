"""Draws chart.svg of the README: measured figures, copied from docs/performance.md.

Run: python docs/assets/make_chart.py (needs matplotlib).
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {"svg.hashsalt": "qlora", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)
from matplotlib import pyplot  # noqa: E402

# "CPU with AMX": time / time of torch's dense bf16 matmul, 4096 x 4096, two cores of an Intel Xeon.
CPU_TOKENS = (1, 3, 16, 64, 128, 512, 2048)
CPU_RATIOS = {
    "forward": (0.38, 0.47, 0.50, 0.50, 0.52, 0.81, 0.98),
    "forward, both with an adapter": (0.36, 0.49, 0.50, 0.50, 0.49, 0.69, 0.87),
    "backward, both with an adapter": (None, 0.49, 0.53, 0.60, 0.65, 0.76, 0.87),
}
# "NVIDIA GPU": milliseconds of four Llama-3-8B layers with LoRA of rank 16, forward and backward, H200.
GPU_TOKENS = (512, 2048, 4096, 8192)
GPU_MILLISECONDS = {
    "bitsandbytes": (47.1, 52.4, 59.8, 116),
    "dense bf16": (32.4, 34.5, 58.0, 117),
    "qlora": (30.8, 32.8, 43.0, 86.2),
}
COLORS = {"bitsandbytes": "#c9a227", "dense bf16": "#9aa5b1", "qlora": "#1f6feb"}

figure, (cpu, gpu) = pyplot.subplots(1, 2, figsize=(9.2, 3.3), layout="constrained", facecolor="white")

for (label, ratios), color in zip(CPU_RATIOS.items(), ("#1f6feb", "#2da44e", "#bf3989"), strict=True):
    points = [(t, r) for t, r in zip(CPU_TOKENS, ratios, strict=True) if r is not None]
    cpu.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, color=color)
cpu.axhline(1, color="#9aa5b1", linestyle="--", linewidth=1)
cpu.text(1, 1.01, "torch, dense bf16", color="#57606a", va="bottom", fontsize=8)
cpu.set(xscale="log", ylim=(0, 1.12), xlabel="tokens", ylabel="time ÷ time of dense bf16")
cpu.set_xticks(CPU_TOKENS, [str(t) for t in CPU_TOKENS])
cpu.minorticks_off()
cpu.legend(frameon=False, loc="lower right", fontsize=8)
cpu.set_title("CPU: 4096 × 4096, two cores of a Xeon with AMX", fontsize=9)

WIDTH = 0.27
for i, (label, values) in enumerate(GPU_MILLISECONDS.items()):
    bars = gpu.bar(
        [x + (i - 1) * WIDTH for x in range(len(GPU_TOKENS))], values, WIDTH, label=label, color=COLORS[label]
    )
    gpu.bar_label(bars, [f"{v:g}" for v in values], fontsize=7, padding=1)
gpu.set(xlabel="tokens", ylabel="milliseconds")
gpu.set_xticks(range(len(GPU_TOKENS)), [f"{t:,}" for t in GPU_TOKENS])
gpu.legend(frameon=False, fontsize=8)
gpu.set_title("H200: four Llama-3-8B layers with LoRA, forward + backward", fontsize=9)

figure.savefig(Path(__file__).with_name("chart.svg"), metadata={"Date": None, "Creator": None})
