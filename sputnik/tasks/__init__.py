"""Problems and typed verdicts. Knows nothing of models."""
