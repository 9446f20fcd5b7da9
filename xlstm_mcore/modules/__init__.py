"""The other parts of a block and of the model: projections, norm, feed-forward, soft cap, loss."""
