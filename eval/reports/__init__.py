"""What is said about results, of one model or of several."""
