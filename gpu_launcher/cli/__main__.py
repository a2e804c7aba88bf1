"""`python -m gpu_launcher.cli` is `gpu-launcher`."""

from gpu_launcher.cli.main import main

main()
