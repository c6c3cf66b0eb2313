"""JEST: joint sampling, learnability, and the losses of single pairs."""
