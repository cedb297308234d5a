"""Image archives: the images of an unlabelled corpus that are closest to the names of categories, by CLIP.

Knows embeddings, their ranking, and which of the best images an archive keeps. A job on Ray Data like `pipeline`.
"""
