"""How the threads and event loops of this process get leases, and hold them."""
