"""What a run keeps to go on from: written, found again, verified and read."""
