"""Whether a teacher says here what its own reference implementation says, before anything is
learnt from it."""
