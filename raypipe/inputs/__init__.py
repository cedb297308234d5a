"""What to label: folders, globs, lists, tables, tars and archives as manifest rows, and the bytes behind each row.

Knows files as people have them, and which mask file belongs to which image. Never imports a run, a method, or Ray.
"""
