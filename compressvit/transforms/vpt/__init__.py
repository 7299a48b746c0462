"""VPT: prompt tokens."""
