"""Functions of any Python program, run in processes that have devices of the pool."""
