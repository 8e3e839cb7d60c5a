"""One module per host; each imports its host, and only its host."""
