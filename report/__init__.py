"""Runs drawn, compared and repeated."""

import os

# A notebook's MPLBACKEND may name a backend that this environment lacks, and a matplotlibrc may be in another encoding:
# with either, Matplotlib cannot be imported. Plots depend on neither
SET_ASIDE = {name: os.environ.pop(name) for name in ("MPLBACKEND", "MATPLOTLIBRC") if name in os.environ}
os.environ["MATPLOTLIBRC"] = os.devnull
try:
    import matplotlib  # noqa: F401
finally:
    del os.environ["MATPLOTLIBRC"]
    os.environ.update(SET_ASIDE)
