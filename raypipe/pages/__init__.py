"""HTML pages that need no network: templates, the style that all share, and the round numbers beside an axis.

Knows how texts become a page without a foreign script. Never reads a file of a run. Never imports Ray.
"""
