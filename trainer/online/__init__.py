"""In-loop selection: when it is on, what a step of it costs, how it scores, and what it chose."""
