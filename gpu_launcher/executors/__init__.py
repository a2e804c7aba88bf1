"""Function calls of Python programs, made in processes that have devices of the pool."""
