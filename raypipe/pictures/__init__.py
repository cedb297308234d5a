"""Masks over photographs: overlays, layers for a page, the picture sheet; faces in photographs.

Knows colours, names and sizes of what people look at. Reads rows and originals, never labels anything. Never imports
Ray, a method, or `pipeline`.
"""
