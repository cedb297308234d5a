"""What a job runs on: Ray and its resources, cores, signals, the line of progress.

Knows nothing of what the job does. Never imports `pipeline`, `run` or a method.
"""
