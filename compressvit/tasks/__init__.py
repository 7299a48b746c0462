"""What the outputs of a model mean: head, targets, the loss against them, metrics, agreement of two models."""
