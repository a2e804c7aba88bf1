"""The tickets and leases of a pool."""

from gpu_launcher.leases.file_ledger import FileLedger
from gpu_launcher.leases.grant_policy import DevicePreference, Wait
from gpu_launcher.leases.ledger import (
    HeldLease,
    LeaseView,
    Ledger,
    PoolView,
    Ticket,
    TicketView,
    describe_wait,
    refusal,
)
from gpu_launcher.leases.pool_directory import choose_pool_directory, resolve_pool_directory
from gpu_launcher.leases.usage import DeviceUse, leased_memory, leases_of, owners_of, uses_of

__all__ = [
    "DevicePreference",
    "DeviceUse",
    "FileLedger",
    "HeldLease",
    "LeaseView",
    "Ledger",
    "PoolView",
    "Ticket",
    "TicketView",
    "Wait",
    "choose_pool_directory",
    "describe_wait",
    "leased_memory",
    "leases_of",
    "owners_of",
    "refusal",
    "resolve_pool_directory",
    "uses_of",
]
