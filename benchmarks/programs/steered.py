"""The command line, with a control socket (`open`) or without one (`closed`)."""

import sys

from gpu_launcher.cli.main import main
from gpu_launcher.jobs import head

if sys.argv[1] == "closed":
    head._open_control = lambda recorder: None
del sys.argv[1]
main()
