"""Benchmarks that others have made: their files, which the user brings, and their numbers."""
