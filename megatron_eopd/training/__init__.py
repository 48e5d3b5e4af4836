"""The optimizer step: Megatron's schedules, data parallelism and optimizer around the objective."""
