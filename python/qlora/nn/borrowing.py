"""Finds layers whose weight other modules read, by parsing the model's source: such a weight must stay dense.

A packed weight has another dtype and another shape. Code that multiplies with it, or casts activations to its dtype,
fails in the first forward or silently computes something else.
"""

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

# Methods that run before the layers are quantized, or that only report the model's device and dtype.
_BEFORE = ("__init__", "init_weights", "_init_weights", "reset_parameters", "_reset_parameters", "device", "dtype")
# Bloom reads weights only to reproduce its tensor-parallel pretraining (slow_but_exact with pretraining_tp > 1).
_EXEMPT = ("BloomAttention", "BloomMLP")
_HARMLESS = ("device", "is_cuda")  # attributes with the same meaning on a packed weight


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Syntax trees of the classes in a Python module, by name; empty if its source is not available."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@cache
def _reads(cls: type) -> frozenset[str]:
    """Dotted names, relative to an instance of ``cls``, of the modules whose ``weight`` its methods read."""
    found: set[str] = set()
    for parent in cls.__mro__:
        if parent is nn.Module:
            break
        source = _classes(parent.__module__).get(parent.__name__)
        for function in ast.walk(source) if source is not None else ():
            if isinstance(function, ast.FunctionDef) and function.name not in _BEFORE:
                found |= set(_weights_read(function))
    return frozenset(found)


def _weights_read(function: ast.FunctionDef) -> Iterator[str]:
    harmless = {
        id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr in _HARMLESS
    }
    for node in ast.walk(function):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight") or id(node) in harmless:
            continue
        names, owner = [], node.value
        while isinstance(owner, ast.Attribute):
            names.append(owner.attr)
            owner = owner.value
        if names and isinstance(owner, ast.Name) and owner.id == "self":
            yield ".".join(reversed(names))


def borrowed(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The layers among ``names`` whose weight a parent module's code reads, each with that module's class name."""
    result = {}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            cls: Any = type(model.get_submodule(".".join(parts[:depth])))
            if cls.__name__ in _EXEMPT or cls.__module__.startswith("torch.nn."):  # see replace_module for torch's own
                continue
            if ".".join(parts[depth:]) in _reads(cls):
                result[name] = cls.__name__
    return result
