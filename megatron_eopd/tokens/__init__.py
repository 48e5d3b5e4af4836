"""Signals of single tokens: gathered beside the loss, kept in files, shown by view.py."""
