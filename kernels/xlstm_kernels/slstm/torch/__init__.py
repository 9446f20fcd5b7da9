"""The sLSTM in PyTorch."""
