"""Scores that carry their error bars and their decoding settings."""
