"""`raypipe report`: runs as one HTML page of pictures, measures, errors and provenance; and `raypipe explain`.

Knows what is odd about an image. Reads runs, labels and what `evaluation` measured. Never imports Ray.
"""
