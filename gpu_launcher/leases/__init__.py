"""Who holds what: the queue of tickets and the leases of a pool."""

from gpu_launcher.leases.directory import choose_pool_directory, resolve_pool_directory
from gpu_launcher.leases.files import FileLedger
from gpu_launcher.leases.holders import leases_of
from gpu_launcher.leases.holds import Hold, holds_on, leased_memory, owners_of
from gpu_launcher.leases.ledger import (
    Lease,
    LeaseView,
    Ledger,
    PoolView,
    Ticket,
    TicketView,
    describe_wait,
    refusal,
)
from gpu_launcher.leases.memory import MemoryLedger, MemoryPool
from gpu_launcher.leases.policy import Taste, Wait
from gpu_launcher.leases.records import Origin

__all__ = [
    "FileLedger",
    "Hold",
    "Lease",
    "LeaseView",
    "Ledger",
    "MemoryLedger",
    "MemoryPool",
    "Origin",
    "PoolView",
    "Taste",
    "Ticket",
    "TicketView",
    "Wait",
    "choose_pool_directory",
    "describe_wait",
    "holds_on",
    "leased_memory",
    "leases_of",
    "owners_of",
    "refusal",
    "resolve_pool_directory",
]
