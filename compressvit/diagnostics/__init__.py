"""What compression did to a model: one file a diagnostic.

To add one, write a file beside `gradients.py` with a `Measured` or `Watched`. It is found by itself; recipes, their schema and `plan`
then know its word.
"""
