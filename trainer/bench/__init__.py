"""`siftclip data bench`: how fast samples come, and what training waits for."""
