"""A run's folder: which images are pending, what is committed, and the committed rows for those who come after.

Knows the commit protocol, and nothing of what a method, an input or a job is. Never imports `inputs`, `pipeline`, a
method or Ray.
"""

from raypipe.run.frozen import NewerRun, OtherConfiguration, parsed, refuse_newer, refuse_other, version_of
from raypipe.run.ids import Ids, superseded
from raypipe.run.run import OURS, DamagedRun, Run, new_attempt
from raypipe.run.seal import is_sealed, seal
