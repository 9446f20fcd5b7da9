"""Files that somebody else may have written: what they may say, and their values once checked."""
