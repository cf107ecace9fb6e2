"""Bundle in, smaller bundle out, and the measure of what that cost."""
