"""What `gpu-launcher doctor` looks at: each module examines one part of the machine, and changes nothing."""
