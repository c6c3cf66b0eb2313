"""Siftclip from Python: what the commands do, as functions with results that can be looked at."""
