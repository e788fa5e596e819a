"""Verbs that use a trained model: `generate` and `chat`."""
