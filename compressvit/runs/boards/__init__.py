"""Boards, which show the curves, findings and results of runs: one file per board. TensorBoard is always written."""
