"""The API server: supervisor, gateway and engine worker, three processes."""
