"""Divergences on vocab-parallel logits, and the objective that is made of them."""

from megatron_eopd.losses.divergences import KLTerms, dense_kl_terms
from megatron_eopd.losses.vocab_parallel import vocab_parallel_kl_terms, vocab_parallel_terms

__all__ = ["KLTerms", "dense_kl_terms", "vocab_parallel_kl_terms", "vocab_parallel_terms"]
