"""Values computed from a teacher, before any training."""
