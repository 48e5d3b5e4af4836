"""Entropy-aware on-policy distillation on Megatron-Core: prompts in, a distilled student out."""

import warnings

# Megatron-Core says five times per process that these are absent; both are optional here, and the
# README says what runs without them.
warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed.*")
