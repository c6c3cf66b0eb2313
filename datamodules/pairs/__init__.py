"""Selected pairs for anybody's training loop: plain batches, epochs of a known length."""
