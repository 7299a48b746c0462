"""Images by name, in batches, as a model wants them."""
