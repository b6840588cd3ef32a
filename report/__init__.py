"""Runs drawn, compared and repeated."""

import os

# A notebook's MPLBACKEND may name a backend that this environment lacks, with which Matplotlib cannot be imported
BACKEND = os.environ.pop("MPLBACKEND", "")
try:
    import matplotlib  # noqa: F401
finally:
    os.environ.update({"MPLBACKEND": BACKEND} if BACKEND else {})
