"""Anthropic's Messages: a dialect of the same requests and answers."""
