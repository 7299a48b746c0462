"""Losses and the training loop; one file per loss term and one file or folder per phase."""
