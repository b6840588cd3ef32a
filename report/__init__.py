"""Reports on runs: plots, contact sheets, pages, comparisons, and series of runs."""

import os

# Matplotlib cannot be imported if MPLBACKEND (set by a notebook) names a backend that this environment lacks, or if a
# matplotlibrc is in another encoding. Plots depend on neither
os.environ.pop("MPLBACKEND", None)
os.environ["MATPLOTLIBRC"] = os.devnull
