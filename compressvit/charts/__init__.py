"""Charts, findings (a table with its chart and how to read it), and both as files."""
