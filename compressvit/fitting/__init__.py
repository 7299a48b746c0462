"""Values from a teacher, before any training."""
