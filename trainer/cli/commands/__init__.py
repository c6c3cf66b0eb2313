"""A module for each command: its settings, its stage, what it prints."""
