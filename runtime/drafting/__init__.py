"""Drafting: cheap guesses at the next tokens, which the model confirms several at a time."""
