"""Command lines of other trainers, as ours."""
