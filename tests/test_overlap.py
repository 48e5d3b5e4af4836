"""What the overlap of both models' top k costs; what it says: test_objective.py and, on several
ranks, distributed/test_picked_tokens.py and distributed/test_diagnostics.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eopd.losses.overlap import entries_at_once, top_k_overlap
from megatron_eopd.losses.top_k import top_k_of_rows
from megatron_eopd.losses.vocab_parallel import vocab_parallel_terms

MOST_BYTES = 8 * entries_at_once(torch.device("cpu"))


class LargestTensor(TorchDispatchMode):
    """Most bytes of any tensor that an operation makes; views of `known` are not made."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.num_bytes = max(self.num_bytes, storage.nbytes())
        return out


@pytest.mark.parametrize(
    "num_tokens,num_columns,k", [(512, 10_000, 16), (256, 40_000, 128), (256, 10_000, 128)]
)
def test_few_rows_are_ordered_at_once(num_tokens, num_columns, k):
    """No tensor is larger than the int64 keys of `entries_at_once`, whether or not rows are
    first cut down to blocks; and the tokens in both top k are those of all rows at once."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(num_tokens, num_columns, generator=generator).bfloat16()
    teacher = (student + torch.randn(student.shape, generator=generator)).bfloat16()
    terms = vocab_parallel_terms(student, teacher, vocab_size=num_columns, top_k=k)
    with LargestTensor(student, *(x for x in terms.picked if x is not None)) as made:
        overlap = top_k_overlap(terms.picked, student, k, terms.vocabulary)
    assert made.num_bytes <= MOST_BYTES
    lists = zip(terms.picked.top_ids.tolist(), top_k_of_rows(student, k)[1].tolist(), strict=True)
    shared = [len(set(a) & set(b)) for a, b in lists]
    assert overlap.share.tolist() == torch.tensor(shared).div(k).tolist()
    assert min(shared) < max(shared) < k


def test_lists_are_compared_a_few_tokens_at_a_time():
    """Of a small vocabulary the comparison of two lists is the largest part."""
    logits = torch.randn(2, 1024, 100, generator=torch.Generator().manual_seed(0))
    terms = vocab_parallel_terms(*logits, vocab_size=100, top_k=100)
    with LargestTensor(logits, *(x for x in terms.picked if x is not None)) as made:
        overlap = top_k_overlap(terms.picked, logits[0], 100, terms.vocabulary)
    assert made.num_bytes <= MOST_BYTES and (overlap.share == 1).all()
