"""How requests become leases: the queue of a process's requests, the watch over devices, the lease in users' hands."""
