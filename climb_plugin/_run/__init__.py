"""The outer machinery, which may only warn, raise or count."""
