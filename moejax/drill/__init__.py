"""Faults on purpose, on the user's own configuration: which guarantees hold there?"""
