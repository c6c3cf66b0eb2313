"""Checks of what other distributions add to the evaluation."""
