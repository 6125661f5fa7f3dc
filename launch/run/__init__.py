"""A run as data and files: its stages and what they read, its folder and lock, the cluster file. Starts nothing."""
