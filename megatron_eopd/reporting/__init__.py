"""What a run tells people: scalars, lines, texts, reports."""
