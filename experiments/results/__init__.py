"""What a grid comes to: its table, the fits, the figure and the verdicts."""
