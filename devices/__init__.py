"""What hardware is here, how to open a session on it, and what a step costs there."""
