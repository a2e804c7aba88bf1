"""The checks of `gpu-launcher doctor`. Each module examines one part of the machine and changes nothing."""
