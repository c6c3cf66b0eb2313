"""Kinds of tasks, one file each: what a sample is, how it is scored, and what is kept of it."""
