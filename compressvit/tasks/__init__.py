"""What the outputs of a model mean: head, targets, loss, figures, how far two models agree; one file a task."""
