"""What a problem is, and how an answer to it is graded."""
