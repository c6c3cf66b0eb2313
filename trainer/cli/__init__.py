"""The console script: one small module a sub-command."""
