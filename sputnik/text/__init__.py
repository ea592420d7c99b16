"""Text to token ids and back: tokenizer, chat template, corpus, sources of real text. Needs no torch."""
