"""The methods: a file each, and a folder for those of several files."""
