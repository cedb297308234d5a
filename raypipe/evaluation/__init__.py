"""Runs against labels (`evaluate`) and against each other (`agree`).

Knows which label belongs to an image, where data sets lie, what papers print for them and how measures are summed up;
what is measured is a task's business (`tasks/`). Never imports Ray, a method, or `pipeline`.
"""
