"""What runs inside each process of a stage: who it is, its attempt, checks between ranks, how it ended."""
