"""The mixers of the blocks: mLSTM, classic mLSTM, sLSTM, attention."""
