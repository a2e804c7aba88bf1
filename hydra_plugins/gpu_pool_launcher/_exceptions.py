"""Prepares a job's exceptions so that Hydra shows only the user's frames, and shows its own messages in full."""

from __future__ import annotations

import pickle
from types import TracebackType

from omegaconf.errors import OmegaConfBaseException

from gpu_launcher.processes.exceptions import message_of, module_of, users_part


def whole_message(error: BaseException) -> str:
    """The full text of an error of Hydra's or OmegaConf's: its message and, on the next lines, its cause's."""
    parts = [message_of(error).strip()]
    if isinstance(cause := error.__cause__, OmegaConfBaseException) and message_of(cause) not in parts[0]:
        parts.append(message_of(cause).strip())
    return "\n".join(parts)


def parser_message(error: BaseException) -> str:
    """The message of Hydra's parser on one line, without the parts that repeat the override and point into it."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("Error parsing override", "Error when parsing index", "^")
    message = ". ".join(line.rstrip(".:") for line in lines if line and not line.startswith(noise))
    return message + (". For null among the choices write x=null,a" if "NoneType is incompatible" in message else "")


def dumps(value: object) -> bytes:
    """Pickle a value. Uses cloudpickle if plain pickle fails, for example for a class defined in a function.

    Raises any exception that cloudpickle raises.
    """
    try:
        return pickle.dumps(value)
    except Exception:
        import cloudpickle

        pickled: bytes = cloudpickle.dumps(value)
        return pickled


def frames_for_hydra(error: BaseException) -> TracebackType | None:
    """The traceback from Hydra's `run_job` on, if that called the user's code; otherwise the whole traceback.

    Hydra shows only the frames after a frame of that name, and fails if the first of them is OmegaConf's.
    """
    caller = tb = error.__traceback__
    users = users_part(tb)
    while tb is not None and tb is not users:
        caller, tb = tb, tb.tb_next
    if users is None or caller is None or caller is users:
        return error.__traceback__
    by_hydra = module_of(caller) == "hydra.core.utils" and not module_of(users).startswith("omegaconf")
    return caller if by_hydra else error.__traceback__
