"""Where metrics are shown beside metrics.jsonl, each place in a file of its own."""
