"""The mLSTM in PyTorch."""
