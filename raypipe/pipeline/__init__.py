"""`raypipe label`: images to committed masks, on Ray Data or in a plain loop.

Knows the course of a run, the graph of its stages, what guards a worker, and where a foreground comes from. Never
imports what reads a finished run: `report`, `export`, `evaluation`, `maintenance`, `sweep`, `cli`.
"""
