"""The sLSTM as compiled loops on the CPU."""
