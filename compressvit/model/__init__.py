"""A model: where its parts are, changing them in place, what is shared, its files, and what it costs."""
