"""Running a worker function on many processes: by Ray Train, or by plain processes of one machine.

Start at `cluster.launcher`; `cluster.contract` says what workers and callers can rely on. The
package knows nothing of what the workers do.
"""
