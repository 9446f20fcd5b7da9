"""The papers' experiments: grids of ordinary runs, their tables, figures and verdicts."""
