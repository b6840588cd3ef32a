"""Reports on runs: plots, contact sheets, pages, comparisons, and series of runs."""

import os

# Matplotlib cannot be imported if MPLBACKEND (set by a notebook) names a backend that this environment lacks, or if a
# matplotlibrc is in another encoding. Plots depend on neither, so hide both during the import
SET_ASIDE = {name: os.environ.pop(name) for name in ("MPLBACKEND", "MATPLOTLIBRC") if name in os.environ}
os.environ["MATPLOTLIBRC"] = os.devnull
try:
    import matplotlib  # noqa: F401
finally:
    del os.environ["MATPLOTLIBRC"]
    os.environ.update(SET_ASIDE)
