"""The other parts of a block and of the model: norms, projections, feed-forward, loss."""
