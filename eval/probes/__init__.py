"""Classifiers that are fitted on features."""
