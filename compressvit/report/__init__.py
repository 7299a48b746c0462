"""The HTML report of one or several runs, and their comparison."""
