"""Data sets: the folder on disk, importers into it, its checks, and how its text is built."""
