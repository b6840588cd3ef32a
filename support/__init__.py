"""Foundations that any file may use: errors, processes, weight files, optional packages."""
