"""Runs Triton's kernels on CPU, in its interpreter, unless there is a GPU.

Triton decides when it is imported, and other tests import it by way of transformers. So this folder
is a pytest process of its own, with the choice made outside:

    TRITON_INTERPRET=1 python -m pytest tests/triton
"""

import os
import sys

import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
