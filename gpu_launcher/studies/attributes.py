"""The user attributes that a trial gets from us, by name."""

from __future__ import annotations

OURS = "gpu_launcher:"
"""What all of them begin with."""
OWNER = f"{OURS}owner"
"""The program that launched the trial's job, and which of its sweeps it was."""
CLAIM = f"{OURS}claim:"
"""Followed by the id of a sweep: the same of one that tried to take a queued trial."""
JOB = f"{OURS}job"
"""Directory, log, devices, host, and when it began and ended (seconds since the epoch)."""
FAILURE = f"{OURS}failure"
"""Why it failed."""
RETRY_OF = f"{OURS}retry_of"
"""The numbers of the trials with these parameters that were lost or interrupted, in order."""
LOST = f"{OURS}lost"
"""How many of these ran when their sweep, or a process that runs its jobs, died."""
