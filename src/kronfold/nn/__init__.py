"""Structured modules."""
