"""Errors, devices, processes, files and random numbers: what every package may use."""
