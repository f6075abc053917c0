"""Readers, writers and converters of weights."""
