"""A stand-in for TransformerEngine, for machines without it; goes on PYTHONPATH.

Megatron-Core derives its layers from TransformerEngine's classes and hands them its options. These
have the same names, take the same arguments and make parameters of the same names and shapes; none
of them computes. So models of TransformerEngine's specification can be built, and their weights
found, anywhere; what they compute only a GPU can show.
"""

import importlib
import sys
import types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec

import torch

__version__ = "2.9.0"


def _mark(weight, dim):
    """As TransformerEngine's reset_parameters does, whatever the parallel mode."""
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1


class _Linear(torch.nn.Module):
    """Weight [out, in], as large as this rank's part."""

    def __init__(self, in_features, out_features, *, parallel_mode=None, tp_size=1, **options):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fuse_wgrad_accumulation = options.get("fuse_wgrad_accumulation")
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=options["params_dtype"]))
        _mark(self.weight, dim=1 if parallel_mode == "row" else 0)

    def reset_parameters(self, *_):
        """Called by some wrappers; there is nothing to initialise."""


class _LayerNormLinear(_Linear):
    def __init__(self, in_features, out_features, **options):
        super().__init__(in_features, out_features, **options)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=options["params_dtype"])
        )


class _GroupedLinear(torch.nn.Module):
    def __init__(self, num_gemms, in_features, out_features, **options):
        super().__init__()
        for number in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=options["params_dtype"])
            self.register_parameter(f"weight{number}", torch.nn.Parameter(weight))
            _mark(getattr(self, f"weight{number}"), dim=0)


class _RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, *, params_dtype, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))


class _DotProductAttention(torch.nn.Module):
    def __init__(self, *_, **__):
        super().__init__()


class _Anything:
    """Names that are only imported, subclassed, or asked for `apply`."""

    apply = None


class _Module(types.ModuleType):
    """A module that also has every name that nobody gave it."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder:
    """Finds every module below this one."""

    @staticmethod
    def find_spec(name, *_):
        if name.startswith("transformer_engine."):
            return ModuleSpec(name, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _Module(spec.name)

    @staticmethod
    def exec_module(module):
        vars(module).update(_MEMBERS.get(module.__name__.removeprefix("transformer_engine."), {}))


_MEMBERS = {
    "pytorch": {
        "Linear": _Linear,
        "LayerNormLinear": _LayerNormLinear,
        "GroupedLinear": _GroupedLinear,
        "RMSNorm": _RMSNorm,
        "LayerNorm": _RMSNorm,
        "DotProductAttention": _DotProductAttention,
    },
    # (context, what synchronises it): no use on a CPU.
    "pytorch.cpu_offload": {"get_cpu_offload_context": lambda *_: (nullcontext(), None)},
}

sys.meta_path.append(_Finder)
for _name in (
    "common.recipe",
    "pytorch.distributed",
    "pytorch.fp8",
    "pytorch.ops",
):
    importlib.import_module(f"transformer_engine.{_name}")
