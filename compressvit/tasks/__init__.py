"""What the outputs of a model mean: head, targets, loss, metrics, agreement of two models; one file per task."""
