"""What the work asks of the machine: files, memory, processes, progress bars, warnings, packages."""
