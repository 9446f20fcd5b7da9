"""How a process of a run finds its place among the others."""
