"""Runs drawn, compared and repeated."""
