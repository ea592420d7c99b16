"""OpenAI's Responses, as Open Responses writes them down: a dialect of the same requests and answers."""
