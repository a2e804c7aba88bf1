"""Prepares a job's exceptions for Hydra, which then shows only the user's frames, and its own messages in full."""

from __future__ import annotations

import pickle
from types import TracebackType

from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.processes.exceptions import message_of, module_of, users_part


def whole_message(error: BaseException) -> str:
    """All that Hydra would show of its own or OmegaConf's error: the message and, on the next lines, the cause's."""
    parts = [message_of(error).strip()]
    if isinstance(cause := error.__cause__, OmegaConfBaseException) and message_of(cause) not in parts[0]:
        parts.append(message_of(cause).strip())
    return "\n".join(parts)


def dumps(value: object) -> bytes:
    """Pickle a value; with cloudpickle if plain pickle cannot, as for a class defined in a function.

    Raises whatever cloudpickle raises.
    """
    try:
        return pickle.dumps(value)
    except Exception:
        import cloudpickle

        pickled: bytes = cloudpickle.dumps(value)
        return pickled


def frames_for_hydra(error: BaseException) -> TracebackType | None:
    """The traceback from Hydra's `run_job` on, if that called the user's code; otherwise the whole traceback.

    Hydra shows only the frames after one of that name. It fails if the first of these is OmegaConf's.
    """
    caller = tb = error.__traceback__
    users = users_part(tb)
    while tb is not None and tb is not users:
        caller, tb = tb, tb.tb_next
    if users is None or caller is None or caller is users:
        return error.__traceback__
    by_hydra = module_of(caller) == "hydra.core.utils" and not module_of(users).startswith("omegaconf")
    return caller if by_hydra else error.__traceback__
