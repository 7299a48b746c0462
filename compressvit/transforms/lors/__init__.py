"""LORS: linear layers that share a weight and keep a private low-rank term each."""
