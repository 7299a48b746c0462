"""The HTML page of one run or of several."""
