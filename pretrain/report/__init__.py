"""What a run leaves, drawn and told: figures, and one HTML page for one run or several."""
