"""Models on disk: artifacts, adapters, merged models, and files for other programs: one file per format."""
