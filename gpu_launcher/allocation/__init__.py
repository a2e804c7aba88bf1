"""Turns requests into leases: a process's queue of requests, the watch over devices, and the lease that users get."""
