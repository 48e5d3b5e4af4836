"""What a machine has, looked at one thing at a time, for `python -m megatron_eopd.doctor`."""
