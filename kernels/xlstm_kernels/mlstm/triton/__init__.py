"""The mLSTM in Triton."""
