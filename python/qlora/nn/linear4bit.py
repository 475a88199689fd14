"""Linear4bit: an ``nn.Linear`` whose weight is frozen in 4 bit."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from qlora import ops
from qlora.nn.packed import STATISTICS, PackedMatrix
from qlora.nn.replacing import require_plain
from qlora.nn.shared_input import Product, shared_result
from qlora.weight import QuantizedWeight, quantize


class Linear4bit(PackedMatrix, nn.Linear):
    """``y = x Wᵀ + bias`` with a 4-bit W, never dequantized as a whole.

    ``weight`` is a frozen uint8 parameter (out, in / 2), or flat if ``in`` is odd. The statistics are buffers
    ``absmax``, ``nested_absmax`` and ``nested_offset``, which keep their dtype under ``.to(dtype)`` and ``.half()``.
    It computes in the input's dtype (float32, bfloat16, float16), unless ``compute_dtype`` is set: then inputs are cast
    to that dtype and results back.

    The constructor quantizes random weights, as ``nn.Linear`` initializes them; :meth:`from_linear` and
    :meth:`from_weight` take existing ones.
    """

    compute_dtype: torch.dtype | None = None
    dense_class: type[nn.Module] = nn.Linear  # its class when dense: nn.Linear, or transformers' Conv1D

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.adopt(quantize(self.weight, quant_type, block_size, double_quant))
        self.requires_grad_(False)

    @classmethod
    @torch.inference_mode(False)
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> "Linear4bit":
        """A layer with the tensors of ``weight`` (n, k) and ``bias`` [n], without a copy.

        Raises ValueError if ``weight`` is not a matrix.
        """
        if len(weight.shape) != 2:
            raise ValueError(f"weight has shape {weight.shape}: a linear layer needs (out_features, in_features)")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.adopt(weight)
        parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.register_parameter("bias", parameter)
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> "Linear4bit":
        """Quantizes the weight of ``linear``; its bias is shared and frozen.

        Raises ValueError for a layer that computes more than nn.Linear: a subclass with its own forward, a
        parametrization, or hooks.
        """
        require_plain(linear, nn.Linear)
        layer = cls.from_weight(quantize(linear.weight, quant_type, block_size, double_quant), linear.bias)
        return layer.train(linear.training)

    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def run(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scaling: float = 1.0,
        lora_x: Tensor | None = None,
        with_bias: bool = True,
    ) -> Tensor:
        """The fused operation with this weight and an optional adapter; shapes as in :func:`qlora.ops.forward`."""
        if self.compute_dtype is not None and x.dtype != self.compute_dtype:
            dropped = None if lora_x is None else lora_x.to(self.compute_dtype)
            return self.run(x.to(self.compute_dtype), lora_a, lora_b, scaling, dropped, with_bias).to(x.dtype)
        # Reads the dictionaries directly: nn.Module searches three for each attribute, 3 µs for these five.
        parameters: Any = self._parameters
        buffers: Any = self._buffers
        if "weight" not in parameters:  # in a replica of DataParallel tensors are plain attributes
            parameters = buffers = {name: getattr(self, name) for name in ("weight", "bias", *STATISTICS)}
        return ops.forward(
            x,
            parameters["weight"],
            buffers["absmax"],
            buffers["nested_absmax"],
            buffers["nested_offset"],
            (self.out_features, self.in_features),
            self.quant_type,
            self.block_size,
            lora_a,
            lora_b,
            scaling,
            parameters["bias"] if with_bias else None,
            lora_x,
        )

    def fused_product(self) -> Product:
        """What :meth:`forward` computes, for a group of layers with one input."""
        return Product(self)

    def forward(self, x: Tensor) -> Tensor:
        shared = shared_result(self, x)
        return self.run(x) if shared is None else shared

    def to_linear(self, dtype: torch.dtype | None = None) -> Any:
        """A frozen ``dense_class`` layer with the dequantized weight, in ``dtype`` or the dtype before quantization."""
        return self.dense_twin(self.dequantize(dtype), self.bias)

    def dense_twin(self, weight: Tensor, bias: Tensor | None) -> Any:
        """A frozen ``dense_class`` layer with ``bias`` and ``weight`` (out, in), transposed if the class needs it."""
        if self.dense_class is nn.Linear:
            return dense_linear(weight, bias).train(self.training)
        with torch.device("meta"):
            layer = self.dense_class(self.out_features, self.in_features)  # Conv1D(nf, nx)
        layer.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        layer.bias = nn.Parameter(weight.new_zeros(self.out_features) if bias is None else bias.detach())
        return layer.requires_grad_(False).train(self.training)

    def twin(self, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Any:
        """A layer with ``weight`` and this layer's settings: a Linear4bit, or for a Tensor the dense twin."""
        if isinstance(weight, Tensor):
            return self.dense_twin(weight, bias)
        layer = Linear4bit.from_weight(weight, bias)
        layer.compute_dtype, layer.dense_class = self.compute_dtype, self.dense_class
        return layer.train(self.training)

    def get_extra_state(self) -> Tensor:
        """The format, which the tensors do not record: quant type and block size, as the bytes of a JSON object."""
        state = json.dumps({"quant_type": self.quant_type, "block_size": self.block_size}).encode()
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError if the state has another format, because it would dequantize to other weights."""
        theirs = json.loads(bytes(state.tolist()))
        ours = {"quant_type": self.quant_type, "block_size": self.block_size}
        if theirs != ours:
            raise ValueError(f"the state dict holds a weight in {theirs}: this layer has {ours}")

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.nested_absmax.numel() else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}"


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` with ``weight`` (out, in) and ``bias``, without a copy."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
