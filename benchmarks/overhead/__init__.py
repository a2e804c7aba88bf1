"""The parts of `benchmarks/launch_overhead.py`."""
