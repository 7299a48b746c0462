"""A model on disk: an artifact, an adapter, a merged model."""
