"""Who holds what: the queue of tickets and the leases of a pool."""

from gpu_launcher.leases.directory import resolve_pool_directory
from gpu_launcher.leases.files import FileLedger
from gpu_launcher.leases.ledger import Lease, LeaseView, Ledger, PoolView, Ticket, TicketView
from gpu_launcher.leases.memory import MemoryLedger, MemoryPool

__all__ = [
    "FileLedger",
    "Lease",
    "LeaseView",
    "Ledger",
    "MemoryLedger",
    "MemoryPool",
    "PoolView",
    "Ticket",
    "TicketView",
    "resolve_pool_directory",
]
