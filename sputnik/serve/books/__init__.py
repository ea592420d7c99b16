"""Keys, the ledger of usage, and answers kept for retries: what `sputnik serve` writes down, in one database."""
