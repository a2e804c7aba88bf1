"""`gpu-launcher web`: serves pages that show and steer the pool and sweeps."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_launcher.cli import options


@click.command()
@click.argument("directories", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@options.value("--host", "ADDRESS", "Address to listen on. Default: 127.0.0.1, which only this machine reaches.")
@click.option(
    "--port", type=click.IntRange(1, 65535), metavar="NUMBER", help="Port to listen on. Default: 8420, or a free one."
)
@options.value("--socket", "PATH", "Unix socket to listen on instead, for a proxy or an SSH tunnel.")
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Host name under which browsers reach the server, such as a proxy's. Can be repeated.",
)
@click.option("--read-only", is_flag=True, help="Show, but do not steer or start anything.")
@options.devices("Devices to show")
@options.busy_memory
@options.pool_dir
def web(
    directories: tuple[Path, ...],
    host: str | None,
    port: int | None,
    socket: str | None,
    allowed_hosts: tuple[str, ...],
    read_only: bool,
    devices: str,
    busy_memory: str,
    pool_dir: str | None,
) -> None:
    """Show the pool and sweeps in a browser.

    Prints a link and serves until Ctrl-C. Shows the sweeps and maps below each DIR, by default below the current
    directory, and starts new ones. Anyone who has the link can run programs as you, so do not pass it on. Needs
    `pip install 'gpu-launcher[web]'`.

    Examples:

    \b
      gpu-launcher web
      gpu-launcher web ~/project /data/sweeps --read-only
      ssh -L 8420:127.0.0.1:8420 server gpu-launcher web ~/project
    """
    from contextlib import suppress

    from gpu_launcher.cli.printing import print_text
    from gpu_launcher.cli.streams import tell
    from gpu_launcher.errors import OptionError, UsageError
    from gpu_launcher.requirements import check_version

    roots = directories or (Path(),)
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"{root} is not a directory")
    if socket is not None and (host is not None or port is not None):
        raise OptionError("socket", "cannot be combined with --host or --port")
    for distribution in ("starlette", "uvicorn", "jinja2"):
        check_version(distribution)

    from gpu_launcher.web.listener import WebOptions, serve
    from gpu_launcher.web.pool_watch import PoolWatch

    served = WebOptions(
        roots,
        host=host or "127.0.0.1",
        port=port,
        socket=None if socket is None else Path(socket),
        allowed_hosts=allowed_hosts,
        read_only=read_only,
        launcher=_launcher(),
        devices="" if devices == "auto" else devices,
        pool_dir=None if pool_dir is None else Path(pool_dir),
    )
    with suppress(KeyboardInterrupt):
        serve(served, PoolWatch(devices, busy_memory, pool_dir), lambda line: print_text(f"{line}\n"), tell)


def _launcher() -> str:
    """The program `gpu-launcher` of this installation. It is named by its path, so that it is this version."""
    import shutil
    import sys

    beside = Path(sys.executable).with_name("gpu-launcher")
    return str(beside) if beside.exists() else shutil.which("gpu-launcher") or "gpu-launcher"
