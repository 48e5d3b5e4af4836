"""Recordings of tokens for people: a page for the browser, lines for the terminal."""
