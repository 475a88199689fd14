"""How sasstime, a timing model of SASS, launches lora_pack.cu: m [r=16] [parts=8], float32 parts of the activations to
bfloat16, one job of the four."""

from sasstime import Buffer, Launch

from qlora import BFLOAT16, FLAGS, FLOAT32, up  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]


def job(source, out, m, r, parts):
    many = [None, None, ("q", 0), ("B", 0), None]
    return [
        [source, ("i", FLOAT32), ("q", r), ("q", 1)],
        *(("q", m), ("q", r), ("q", r), ("i", 0)),
        out,
        *(("i", BFLOAT16), ("f", 1.0), ("q", 1), ("q", 0), ("i", parts), ("q", m * r), ("i", 0)),
        None,
        ("f", 1.0),
        *many,
    ]


def launch(gpu, m=128, r=16, parts=8):
    source = Buffer("source", parts * m * r * 4, "float", dram=False)
    out = Buffer("out", m * r * 2, dram=False)
    unused = job(None, None, 0, 0, 0)
    parameters = [[[job(source, out, m, r, parts), unused, unused, unused], ("i", 1)]]
    return Launch(r"lora_pack::kernel<qlora::bf16>", (up(m * r, 256), 1, 1), 256, 0, parameters, 4 * parts * m * r)
