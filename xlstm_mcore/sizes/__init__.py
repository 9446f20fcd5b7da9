"""Widths, parameter counts, FLOPs and the sizes of the papers, without torch."""
