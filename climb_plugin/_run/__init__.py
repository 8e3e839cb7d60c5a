"""Holds the outer ring, which may only warn, raise or count."""
