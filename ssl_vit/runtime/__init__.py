"""Errors, devices, processes, files and random numbers, for every package."""
