"""Models on disk: artifacts, adapters, merged models."""
