"""Decides what goes where and what it will cost. Never touches a weight."""
