"""What compression did to a model: similarity of layers, drift from the teacher, gradients, allocation."""
