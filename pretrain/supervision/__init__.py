"""One life of a run: who may write into its folder, how far it is, and whether it still moves."""
