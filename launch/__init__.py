"""The command line, the stage graph, and how stages become processes."""
