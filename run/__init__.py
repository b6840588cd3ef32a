"""One run as its user sees it: its options and its folder."""
