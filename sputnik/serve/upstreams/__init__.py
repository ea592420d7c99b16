"""Other OpenAI-compatible servers behind our gateway: which of them lives, which one answers, and what it says."""
