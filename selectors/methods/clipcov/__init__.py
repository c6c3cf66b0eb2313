"""ClipCov: the method, its terms, and the greedy choice."""
