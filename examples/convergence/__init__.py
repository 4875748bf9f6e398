"""How modes for untouched rows compare in training; the entry point is ../study.py."""
