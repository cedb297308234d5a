"""`raypipe report`: runs as one HTML page of pictures, measures, errors and provenance.

Knows what is odd about an image and how a page is made of a template. Reads runs, labels and what `evaluation`
measured. Never imports Ray.
"""
