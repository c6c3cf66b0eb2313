"""What is fitted to a pool before methods score: moments, clusters, classes."""
