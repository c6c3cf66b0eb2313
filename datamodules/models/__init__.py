"""CLIP models: loading and saving, their options, weights and records."""
