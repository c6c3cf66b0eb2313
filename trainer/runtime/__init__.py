"""What a run runs on and leaves behind: ranks, cores, folders, loggers."""
