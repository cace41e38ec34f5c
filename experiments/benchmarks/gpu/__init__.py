"""What `python -m experiments speed` does on a GPU host; `flight` has the short runs of `.ci/flight`.

tasks: what is timed, the most informative first. candidates, torch_candidates: what each implementation computes.
timing: how long that takes. worker: a process of its own for each of them. measure: hands tasks to workers within a
budget of minutes. report: table, figure, summary.
"""
