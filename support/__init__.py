"""What any file may stand on: errors, processes, files of weights, packages that need not be installed."""
