"""What a run will need, before it starts: memory of every rank, time of an iteration, layouts."""
