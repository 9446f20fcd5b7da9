"""What crosses ranks: tensor-parallel regions, context-parallel slices, states."""
