"""Make docs/images/live.svg, the picture in the README: the live view of `gpu-launcher demo`'s grid, as it runs.

Runs the program in a terminal that pyte emulates, and draws what is on the screen when the
first job has failed and others run. Needs the packages of the extra `docs`:

    python tools/picture.py
"""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import struct
import sys
import tempfile
import termios
from collections.abc import Iterator
from fcntl import ioctl
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

TREE = Path(__file__).resolve().parents[1]
PICTURE = TREE / "docs" / "images" / "live.svg"
COLUMNS, ROWS = 112, 24
COMMAND = "python train.py -m hydra/launcher=gpu_pool hydra.launcher.devices=simulated:4 lr=1,0.1,0.01 width=64,128"
HIDDEN = ("hydra.sweep.dir=sweep", "epoch_seconds=0.5")
COLOURS = {"default": None, "brown": "yellow", **{name: name for name in ("red", "green", "blue", "magenta", "cyan")}}
"""Rich's names for pyte's colours. pyte gives others as six hexadecimal digits."""


def run(directory: Path) -> Iterator[bytes]:
    """Run the sweep in a terminal, and yield what it writes."""
    shutil.copyfile(TREE / "gpu_launcher" / "cli" / "demo_program.py", directory / "train.py")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", GPU_LAUNCHER_POOL_DIR=str(directory / "pool"))
        os.execv(sys.executable, [sys.executable, *COMMAND.split()[1:], *HIDDEN])
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        while select.select([terminal], [], [], 60)[0]:
            yield os.read(terminal, 65536)
    except OSError:  # EIO: the program has ended
        pass
    finally:
        os.close(terminal)  # SIGHUP: the sweep ends its jobs
        os.waitpid(pid, 0)


def shown(screen: pyte.Screen) -> Text:
    """Return the screen's contents with their colours."""
    text = Text()
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        for (colour, bold, reverse), alike in groupby(cells, key=lambda cell: (cell.fg, cell.bold, cell.reverse)):
            style = Style(color=COLOURS.get(colour, f"#{colour}"), bold=bold, reverse=reverse)
            text.append("".join(cell.data for cell in alike), style)
        text.append("\n")
    text.rstrip()
    return text


def main() -> None:
    """Draw the first screen on which a job has failed and four others run."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    lines = ""
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        output = run(Path(directory))
        for data in output:
            stream.feed(data)
            lines = "\n".join(screen.display)
            if "1 failed  4 running" in lines:
                break
        else:
            sys.exit(f"the moment to draw did not come; the last screen was:\n{lines}")
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        console.print(f"[bold green]$[/] {COMMAND}", highlight=False)
        console.print(shown(screen))
        output.close()
    PICTURE.write_text(console.export_svg(title="gpu-launcher"))


if __name__ == "__main__":
    main()
