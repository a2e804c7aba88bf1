"""`gpu-launcher map`: one command over many parameters."""
